"""A run folder → its other homes (ONNX, torch.export, Triton), and the table that compares them."""
