"""Tables, plots and an HTML page from the folders of finished runs."""
