"""What the cost model was fitted to and is judged by: times, errors, budgets."""
