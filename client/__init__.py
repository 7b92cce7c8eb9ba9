"""A running TorchServe from the outside: predictions, models and workers, tokens, readiness.

from client.torchserve import TorchServe

TorchServe().predict("lenet5-digits", Path("digit.png").read_bytes())
"""
