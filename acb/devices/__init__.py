"""What a GPU is to acb: the seams to real devices and the simulated one. Knows no framework."""
