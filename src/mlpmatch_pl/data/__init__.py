"""Files to batches: sources, splits, views, samplers, checks, and the data module."""
