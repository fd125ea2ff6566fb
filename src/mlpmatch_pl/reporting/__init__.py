"""From run folders to tables, plots and a page. Reads files only: no torch, no Hydra."""
