"""Preparation of the public datasets: download, verification, conversion."""
