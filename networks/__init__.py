"""The name of a network, or a checkpoint → a network with its weights, how its images were prepared, and its export."""
