"""One training and its directory: settings, recipes, resuming, the model card, progress."""
