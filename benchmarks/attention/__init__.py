"""How long attention takes, everything included, against the fastest dense attention."""
