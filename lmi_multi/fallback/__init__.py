"""Another engine for what no family declares: transformers computes the network, this package does
all the rest. Only on request, and without code that comes with a checkpoint."""
