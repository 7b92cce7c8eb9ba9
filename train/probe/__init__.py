"""A frozen network with a linear head: the features of each image once, then the head in seconds."""
