"""Methods as data, the training step, its losses and schedules. Pure torch."""
