"""Predict masks for image files."""
