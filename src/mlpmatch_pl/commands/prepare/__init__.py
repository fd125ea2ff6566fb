"""Download, verify and convert the benchmark datasets."""
