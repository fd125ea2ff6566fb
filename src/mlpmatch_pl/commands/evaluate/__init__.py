"""Evaluate a checkpoint on a dataset."""
