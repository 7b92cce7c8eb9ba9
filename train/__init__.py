"""Recipe → run folder: data, models, the training loop, export and evaluation of what will be served."""
