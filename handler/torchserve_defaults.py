"""What TorchServe 0.12 does by itself where neither an archive nor a configuration says otherwise."""

BATCH_SIZE = 1
BATCH_DELAY_MS = 100
"""Longest wait for a batch to fill; a delay of 0 becomes this as well."""
TIMEOUT_S = 120
"""Longest wait for a worker: for the answers to a batch, for a start, and for its end."""
RETRY_TIMEOUT_S = 300
"""How long a worker that dies is started again."""
JOB_QUEUE_SIZE = 100
"""Requests that wait for a worker of one model."""
