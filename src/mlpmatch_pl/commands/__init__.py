"""The commands: what `python -m mlpmatch_pl.<verb>` runs."""
