"""What a training costs on this machine, see `mlpmatch_pl.benchmark`."""
