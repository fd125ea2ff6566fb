"""Exporting a checkpoint: to files that need this package no more, compared with it before they are kept."""
