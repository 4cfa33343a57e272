"""One forward over several GPUs: Ulysses, ring and both, dense and sparse."""
