"""The speed of a training on this machine, measured before it starts."""
