"""Find out which tricks help a model, and with which arguments."""
