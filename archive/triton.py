"""A model repository for Triton Inference Server: a folder NAME that its `--model-repository` may point beside."""

from __future__ import annotations

from archive.preprocessing import INPUT, OUTPUT
from archive.reference import Reference

CONFIG_FILE, LABELS_FILE, VERSION = "config.pbtxt", "labels.txt", "1"


def config(reference: Reference, name: str) -> str:
    """Triton's ModelConfig as text: the batches that TorchServe would gather, gathered by Triton."""
    settings = reference.settings
    batch_size = int(reference.config["batchSize"])
    delay_us = 1000 * int(reference.config["maxBatchDelay"])
    return f"""name: "{name}"
backend: "onnxruntime"
max_batch_size: {batch_size}
input [
  {{
    name: "{INPUT}"
    data_type: TYPE_UINT8
    dims: [ {settings.channels}, {settings.crop_size}, {settings.crop_size} ]
  }}
]
output [
  {{
    name: "{OUTPUT}"
    data_type: TYPE_FP32
    dims: [ {len(reference.class_names)} ]
    label_filename: "{LABELS_FILE}"
  }}
]
dynamic_batching {{
  max_queue_delay_microseconds: {delay_us}
}}
"""


def labels(reference: Reference) -> str:
    """A class name on each line, in the order of the model's outputs."""
    return "".join(f"{' '.join(name.split())}\n" for name in reference.class_names)
