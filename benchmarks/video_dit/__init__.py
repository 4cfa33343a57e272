"""A small video diffusion transformer, trained from scratch, to measure real generations on."""
