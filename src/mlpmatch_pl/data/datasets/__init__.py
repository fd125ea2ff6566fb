"""Descriptions of datasets: benchmarks, folders of your own, embedded scenes."""
