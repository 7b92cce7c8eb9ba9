"""The names of what a worker finds beside its model. The archive and the run folder call them so as well."""

CONFIG_FILE = "model-config.yaml"
LABELS_FILE = "index_to_name.json"
GOLDEN = "golden"
REFERENCE_FILE = "reference.json"
ACCEPTANCE_FILE = "acceptance.json"
INT8_FILE, ONNX_FILE = "model.int8.onnx", "model.onnx"
