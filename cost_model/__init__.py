"""First floor: what a site gains from sparse attention. Knows sites' plain facts, never graphs."""
