"""Whole forwards and whole generations of real configurations: the seconds that a user feels."""
