"""Benchmark data sets from their public archives: download, safe extraction, conversion, verification."""
