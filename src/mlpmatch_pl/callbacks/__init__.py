"""Lightning callbacks: checkpoints, stop signals, progress, pictures. They do not import Hydra."""
