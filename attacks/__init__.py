"""Measures what a trained model leaks about its training data, however it was trained."""
