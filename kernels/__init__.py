"""Ground floor: tensors, cluster labels and block lists. Knows no graph, layer or budget."""
