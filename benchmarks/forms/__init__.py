"""The same networks in each form that a worker could run."""
