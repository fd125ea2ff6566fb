"""Public benchmark data sets, as they lie on the disk after `python -m mlpmatch_pl.prepare`."""
