"""What the backend adds to what people use already: quantised layers, adapters, step caches."""
