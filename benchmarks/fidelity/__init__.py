"""How close generated videos stay to dense attention, by rule, density and time."""
