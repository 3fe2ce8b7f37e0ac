"""Shared machinery. It knows no trick by name and imports no room."""
