"""What a GPU gives: networks, decoding of JPEG, and the handler's own path."""
