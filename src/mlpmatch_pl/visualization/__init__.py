"""Images for people: panels of predictions, plots, previews of batches."""
