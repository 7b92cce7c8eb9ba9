"""Which network for one's own images: several are tried, measured as they would be served, and one is trained."""
