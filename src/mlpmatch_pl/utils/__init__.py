"""Helpers without knowledge of the method: files, errors, seeds, processes, validation."""
