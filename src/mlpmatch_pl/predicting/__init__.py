"""Predicting files: from a configuration to masks, colours and overlays."""
