"""Weak and strong views of an image."""
