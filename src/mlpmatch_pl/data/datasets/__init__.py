"""Datasets: public benchmarks, your own folders, generated scenes."""
