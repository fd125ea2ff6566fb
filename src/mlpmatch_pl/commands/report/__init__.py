"""Compare runs: tables, plots and an HTML page from run folders, without torch."""
