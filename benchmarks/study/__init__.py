"""A study: several methods on several datasets at equal processor time, see `benchmarks.study.__main__`."""
