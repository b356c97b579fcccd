"""Trainers that people have already, made private."""
