"""Lightning callbacks: checkpoints, progress, pictures. They know Lightning and loggers, and nothing of Hydra."""
