"""First floor: finds attention in a Dynamo graph, says what it is, rewrites it into the operator.

Knows nothing of milliseconds or error curves.
"""
