"""Evaluating a checkpoint: from its data to tables, pictures and numbers."""
