"""Averages of the weights over time."""
