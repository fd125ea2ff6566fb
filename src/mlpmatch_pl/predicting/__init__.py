"""Predicting files: from a configuration to masks, colors and overlays."""
