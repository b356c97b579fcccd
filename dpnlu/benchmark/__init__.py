"""What private training costs: time and memory, next to ordinary training of the same model."""
