"""What runs inside a TorchServe worker: encoded image bytes → uint8 tensor → probabilities → labelled answer.

This package travels inside every archive, so it imports nothing else of the project.
"""
