"""Whether a model file is data alone, judged before anything loads it.

| file | refused |
|---|---|
| `.pt` | all but TorchScript, and TorchScript that calls what writes or reads other files |
| `.pt2` | pickled weights and objects, compiled code, and expressions and operators that no classifier needs |
| `.onnx` | tensors that lie in other files |

`.safetensors` files hold tensors and nothing else, and `torch.load(..., weights_only=True)` judges a checkpoint itself.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from archive.errors import UnsafeFile

_MAX_TEXT_BYTES = 64 << 20
"""Of all code or JSON in a model file."""
_MAX_DIRECTORY_BYTES = 16 << 20
_END = struct.Struct("<4s8xIIH")
"""What ends a ZIP file: its mark, then size and place of the directory and the length of a comment."""
_MAX_MEMBERS = 100_000
_CHUNK = 1 << 16
_MEMBER = re.compile(r"[A-Za-z0-9_.+-]+(/[A-Za-z0-9_.+-]+)+")

_NOT_TORCHSCRIPT = "it is not TorchScript: loading another kind of file could run code"
_NOT_OF_PYTORCH = "it is no file that PyTorch wrote"
_REACHES_OUT = frozenset({"save", "from_file", "load_tensor", "rpc_sync", "rpc_async", "rpc_remote"})
"""Operators of PyTorch that TorchScript may call and that write files, map files or ask other machines."""
_OPERATORS = frozenset({"aten", "prim", "quantized"})

_PT2_FILES = re.compile(
    r"data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|data/sample_inputs/model\.pt|models/model\.json"
    r"|archive_format|archive_version|byteorder|\.data/(version|serialization_id)"
)
_PT2_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_PT2_OPERATOR = re.compile(
    r"torch\.ops\.aten\.(?P<name>\w+)\.\w+|torch\.sym_\w+"
    r"|_operator\.(getitem|add|sub|mul|floordiv|mod|neg|eq|ne|lt|le|gt|ge)"
)
# torch.export.load gives expressions to sympy, which evaluates them as Python.
_PT2_EXPRESSION = re.compile(
    r"(Symbol\('[su]\d+'(, [a-z]+=(True|False))*\)|[su](?=\d)|[ \d,()+-]|\*(?!\*)"
    r"|(Add|Mul|Max|Min|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv|IntTrueDiv|Integer)\()+"
)
_PT2_TREE = re.compile(r"builtins\.(tuple|list|dict)")
_PT2_ARGUMENTS = re.compile(
    r"as_(name|none|tensors?|ints?|floats?|bools?|string|sym_(int|float|bool)s?|optional_tensors?|expr|scalar_type"
    r"|memory_format|layout|device)"
)
_PT2_DESCRIPTIONS = frozenset({"stack_trace", "nn_module_stack", "torch_fn", "source_fn_stack", "from_node"})
_PT2_EMPTY = frozenset({"guards_code", "treespec_namedtuple_fields", "custom_obj_values", "script_object_metadata"})

_ONNX_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
"""Message of onnx.proto → the fields through which a tensor is reached."""
_ONNX_EXTERNAL_FIELDS = (13, 14)
"""Of a tensor: `external_data` and `data_location`."""
_ONNX_MAX_DEPTH = 40


class _NotData(Exception):
    """What is wrong, without the file's name."""


def check(path: Path) -> None:
    """Judge a file by its suffix; one of another suffix passes.

    Raises:
        UnsafeFile: loading it could run code or reach other files, or it cannot be read.
    """
    try:
        if path.suffix not in _JUDGES:
            return
        with path.open("rb") as file:
            found = problem(file, path.suffix)
    except OSError as error:
        raise UnsafeFile(f"cannot read {path}: {error.strerror or error}") from None
    if found:
        raise UnsafeFile(f"{path}{found}. It was not loaded: take a file that training or export wrote")


def problem(file: BinaryIO, suffix: str) -> str | None:
    """Why a file of that suffix is not data alone, to be read after its name; None where it is, or is not judged."""
    try:
        if judge := _JUDGES.get(suffix):
            judge(file)
    except _NotData as error:
        return f" {text[3:]}" if (text := str(error)).startswith("it ") else f": {text}"
    except RecursionError:
        return " is nested too deeply"
    except Exception as error:  # zipfile, json and ast raise what they like on hostile files
        return f" cannot be read as the {suffix} file of a model ({error!r:.200})"
    return None


def _torchscript(file: BinaryIO) -> None:
    with _opened(file, _NOT_TORCHSCRIPT) as archive:
        members = _members(archive)
        code = {name: info for name, info in members.items() if name.startswith("code/") and name.endswith(".py")}
        if "constants.pkl" not in members or not code:
            raise _NotData(_NOT_TORCHSCRIPT)
        for text in _texts(archive, code).values():
            _check_script(ast.parse(text))


def _check_script(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        name = ast.unparse(node)
        if node.attr in _REACHES_OUT:
            raise _NotData(f"its code calls {name}, which reaches beyond the model")
        if isinstance(node.value, ast.Name) and node.value.id == "ops" and node.attr not in _OPERATORS:
            raise _NotData(f"its code calls {name}, which is no part of PyTorch's own operators")
        if re.fullmatch(r"__torch__\.torch\.classes\.\w+", name) and node.attr != "quantized":
            raise _NotData(f"its code uses the class {name}, which is no part of a classifier")


def _exported_program(file: BinaryIO) -> None:
    with _opened(file, _NOT_OF_PYTORCH) as archive:
        members = _members(archive)
        for name, info in members.items():
            if not _PT2_FILES.fullmatch(name):
                raise _NotData(f"it holds {name!r}, which training does not write: it could run code")
            if info.compress_type != zipfile.ZIP_STORED:
                raise _NotData(f"{name!r} is compressed, as torch.export writes nothing")
        for name in (*_PT2_CONFIGS, "models/model.json", "data/sample_inputs/model.pt"):
            if name not in members:
                raise _NotData(f"it lacks {name}: torch.export.load would look for pickles of an older form")
        texts = _texts(archive, {name: members[name] for name in (*_PT2_CONFIGS, "models/model.json")})
        for name in _PT2_CONFIGS:
            _check_payloads(name, strict_json(texts[name]))
        _check_program(strict_json(texts["models/model.json"]))
        _check_sample_inputs(_texts(archive, {"": members["data/sample_inputs/model.pt"]})[""])


def _check_payloads(name: str, document: Any) -> None:
    if list(document) != ["config"]:
        raise _NotData(f"{name} has other keys than torch.export writes")
    for tensor, payload in document["config"].items():
        if payload["use_pickle"] is not False or not re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"]):
            raise _NotData(f"the tensor {tensor!r:.100} is a pickle: loading it could run code")


def _check_program(program: Any) -> None:
    for key, value in _pairs(program):
        if key == "target":
            operator = _PT2_OPERATOR.fullmatch(value)
            if operator is None or operator["name"] in _REACHES_OUT:
                raise _NotData(f"it calls {value!r:.100}, which no classifier of ours does")
        elif key == "expr_str":
            if not _PT2_EXPRESSION.fullmatch(value):
                raise _NotData(f"the size {value!r:.100} is no sum or product: it would be evaluated as Python")
        elif key in ("in_spec", "out_spec"):
            for name, kind in _pairs(strict_json(value)):
                if name == "type" and kind is not None and not _PT2_TREE.fullmatch(kind):
                    raise _NotData(f"it takes or gives {kind!r:.100}")
        elif key == "metadata":
            if unknown := set(value) - _PT2_DESCRIPTIONS:
                raise _NotData(f"a node carries {min(unknown)!r:.100}")
        elif key == "range_constraints":
            if not all(re.fullmatch(r"[su]\d+", name) for name in value):
                raise _NotData("a bound is not of a size")
        elif key in _PT2_EMPTY:
            if value:
                raise _NotData(f"it has {key}, which no classifier of ours has")
        elif key.startswith("as_") and not _PT2_ARGUMENTS.fullmatch(key):
            raise _NotData(f"an operator takes {key!r:.100}")


def _check_sample_inputs(data: bytes) -> None:
    """`torch.export.load` unpickles them by any means where they are no plain tensors."""
    import torch

    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception:  # whatever the unpickler refuses
        raise _NotData("its sample inputs are no tensors: loading them could run code") from None


def _onnx(file: BinaryIO) -> None:
    _check_message(file, 0, file.seek(0, os.SEEK_END), "model", 0)


def _check_message(file: BinaryIO, start: int, end: int, message: str, depth: int) -> None:
    """Walk a message of Protocol Buffers as far as tensors are reached through it."""
    if depth > _ONNX_MAX_DEPTH:
        raise _NotData("it is nested too deeply")
    position = start
    while position < end:
        tag, position = _varint(file, position)
        number, kind = tag >> 3, tag & 7
        value, after = 0, position
        if kind == 0:
            value, after = _varint(file, position)
        elif kind == 2:
            size, position = _varint(file, position)
            after = position + size
        elif kind in (1, 5):
            after = position + (8 if kind == 1 else 4)
        else:
            raise _NotData("it is no ONNX file")
        if after > end:
            raise _NotData("it is no ONNX file, or is cut short")
        if message == "tensor":
            if number in _ONNX_EXTERNAL_FIELDS and (kind == 2 or value):
                raise _NotData("a tensor lies in another file, and could be any file of this machine")
        elif kind == 2 and (inner := _ONNX_MESSAGES[message].get(number)):
            _check_message(file, position, after, inner, depth + 1)
        position = after


def _varint(file: BinaryIO, position: int) -> tuple[int, int]:
    file.seek(position)
    data = file.read(10)
    value = 0
    for index, byte in enumerate(data):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise _NotData("it is no ONNX file, or is cut short")


def _opened(file: BinaryIO, otherwise: str) -> zipfile.ZipFile:
    file.seek(max(0, file.seek(0, os.SEEK_END) - _END.size))
    end = file.read(_END.size)
    if len(end) < _END.size:
        raise _NotData(otherwise)
    mark, size, _, comment = _END.unpack(end)
    if mark != b"PK\5\6" or comment or size > _MAX_DIRECTORY_BYTES:
        raise _NotData(otherwise)
    return zipfile.ZipFile(file)


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """By name below the one folder that PyTorch puts all into.

    PyTorch's own reader looks names up without regard to case, and takes the first of two: nothing here may be read
    in two ways.
    """
    infos = archive.infolist()
    if not 0 < len(infos) <= _MAX_MEMBERS or min(info.header_offset for info in infos) != 0:
        raise _NotData(_NOT_OF_PYTORCH)
    members: dict[str, zipfile.ZipInfo] = {}
    root = infos[0].orig_filename.partition("/")[0]
    for info in infos:
        folder, _, name = info.orig_filename.partition("/")
        if folder != root or not _MEMBER.fullmatch(info.orig_filename):
            raise _NotData(f"it holds {info.orig_filename!r:.100}, as PyTorch names nothing")
        members[name] = info
    if len({name.casefold() for name in members}) != len(infos):
        raise _NotData("a name comes twice in it")
    return members


def _texts(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]) -> dict[str, bytes]:
    if sum(info.file_size for info in members.values()) > _MAX_TEXT_BYTES:
        raise _NotData(f"its description has more than the {_MAX_TEXT_BYTES >> 20} MiB allowed")
    texts = {}
    for name, info in members.items():
        with archive.open(info) as member:
            texts[name] = b"".join(iter(lambda: member.read(_CHUNK), b""))
    return texts


def strict_json(text: bytes | str) -> Any:
    """What the document says.

    Raises:
        ValueError: it is no JSON, or a key comes twice, of which another reader could take the other value.
    """
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key comes twice")
    return document


def _pairs(document: Any) -> Iterator[tuple[str, Any]]:
    """Each key of every object in it, at any depth, with its value."""
    waiting = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


_JUDGES = {".pt": _torchscript, ".pt2": _exported_program, ".onnx": _onnx}
