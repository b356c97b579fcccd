"""Intent and slot classifiers: data, models, metrics. Knows nothing of privacy."""
