"""Optimizers: recipes, parameter groups, decay and schedules at work."""
