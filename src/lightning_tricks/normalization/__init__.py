"""Normalization layers and their statistics."""
