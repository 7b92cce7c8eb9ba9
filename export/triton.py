"""A model repository for Triton Inference Server: a folder NAME that its `--model-repository` may point beside."""

from __future__ import annotations

from export.finished_run import FinishedRun
from networks.export import ONNX_INPUT, ONNX_OUTPUT

CONFIG_FILE, LABELS_FILE, VERSION = "config.pbtxt", "labels.txt", "1"


def config(known: FinishedRun, name: str) -> str:
    """Triton's ModelConfig as text: the batches that TorchServe would gather, gathered by Triton."""
    settings = known.settings
    batch_size = int(known.config["batchSize"])
    delay_us = 1000 * int(known.config["maxBatchDelay"])
    return f"""name: "{name}"
backend: "onnxruntime"
max_batch_size: {batch_size}
input [
  {{
    name: "{ONNX_INPUT}"
    data_type: TYPE_UINT8
    dims: [ {settings.channels}, {settings.crop_size}, {settings.crop_size} ]
  }}
]
output [
  {{
    name: "{ONNX_OUTPUT}"
    data_type: TYPE_FP32
    dims: [ {len(known.class_names)} ]
    label_filename: "{LABELS_FILE}"
  }}
]
dynamic_batching {{
  max_queue_delay_microseconds: {delay_us}
}}
"""


def labels(known: FinishedRun) -> str:
    """A class name on each line, in the order of the model's outputs."""
    return "".join(f"{' '.join(name.split())}\n" for name in known.class_names)
