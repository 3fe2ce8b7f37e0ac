"""What is done to data before and after a model sees them."""
