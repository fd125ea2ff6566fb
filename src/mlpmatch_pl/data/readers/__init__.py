"""Read images and masks from files."""
