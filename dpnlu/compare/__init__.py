"""The study: train, attack, report. The one place, with the command line, that imports attacks."""
