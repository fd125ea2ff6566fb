"""Pictures: panels of predictions, plots, previews of batches."""
