"""Reuse of what a network has learned: a new head, layers that stay frozen or thaw, and probes of what each stage knows."""
