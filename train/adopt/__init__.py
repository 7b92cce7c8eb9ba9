"""A model from elsewhere → a run folder, as training writes it: from there on nothing tells the two apart."""
