"""Drop parts of the network at random."""
