"""What ended a worker, in plain words, and what to do about it."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from handler import torchserve_defaults

_MEMORY = (
    r"bad_alloc|[Cc]annot allocate memory|can't allocate memory|not enough memory|out of memory|failed to map segment"
)
_NO_MEMORY = "there is not enough memory for a worker"
_MORE_MEMORY = "give it more memory, or serve a smaller model or fewer workers (serving.workers in the recipe)"
_REBUILD = "train again where the run folder was changed by hand, then archive it again"


@dataclass(frozen=True)
class Evidence:
    """What a worker that ended left behind."""

    errors: list[dict[str, str]] = field(default_factory=list)
    """The chain of exceptions, the first one first: type, message, where."""
    findings: Mapping[str, Any] = field(default_factory=dict)
    signal: int | None = None
    """What killed the process, if anything did."""
    timeout_s: float | None = None
    """How long was waited, if in vain."""
    changed_files: tuple[str, ...] = ()
    """Files of the archive's handler that are not those of this clone."""
    log: str = ""
    memory_limit_mb: int | None = None


@dataclass(frozen=True)
class Diagnosis:
    """Why a worker cannot serve the archive."""

    cause: str
    fix: str
    detail: str = ""
    """The first exception, or the log's last line."""


@dataclass(frozen=True)
class _Rule:
    """Applies to an exception whose type and message match; `cause` and `fix` may name groups of the message."""

    error_type: str
    message: str
    cause: str
    fix: str


_RULES = (
    _Rule("\\w*MemoryError", "", _NO_MEMORY, _MORE_MEMORY),
    _Rule("RuntimeError|ImportError|OSError", _MEMORY, _NO_MEMORY, _MORE_MEMORY),
    _Rule(
        "SyntaxError|IndentationError|TabError", r"^(?P<what>.*?)(?: \(.*)?$",
        "the archive's code is not valid Python: {what}",
        "correct it in handler/ of the clone and archive the run again",
    ),
    _Rule(
        "ModuleNotFoundError", r"No module named '(?P<name>handler[\w.]*)'",
        "the archive lacks {name}, which its handler imports",
        "restore handler/ in the clone and archive the run again",
    ),
    _Rule(
        "ModuleNotFoundError", r"No module named '(?P<name>train|archive|client|server|benchmarks|tests)(?:\.[\w.]*)?'",
        "the archive's code imports {name}, which stays in the clone and does not travel in archives",
        "move what the handler needs into handler/, or do without it, and archive the run again",
    ),
    _Rule(
        "ModuleNotFoundError", r"No module named '(?P<name>(?!ts\.torch_handler)[\w.]+)'",
        "the archive's code imports {name}, which is not installed here",
        "pip install the package that has it, here and where it shall be served, or remove the import",
    ),
    _Rule(
        "ImportError", r"cannot import name '(?P<name>\w+)' from '(?P<module>[\w.]+)'",
        "the archive's code imports {name}, which {module} does not have here",
        "install the versions that sbom.cdx.json in the archive lists, or correct the import",
    ),
    _Rule(
        "ValueError", r"only one class in custom service code",
        "image_classifier.py defines more classes than one, or none, and TorchServe takes exactly one",
        "move every other class, dataclasses too, into another module of handler/ and archive the run again",
    ),
    _Rule(
        "ValueError", r"Expect handle method",
        "the class in image_classifier.py has no method handle, which TorchServe calls",
        "restore handler/image_classifier.py in the clone and archive the run again",
    ),
    _Rule(
        "SettingsError", r"(?s)^(?P<what>.*)$",
        "a setting cannot be used: {what}",
        "correct that key under input or serving in recipe.yaml of the run folder, and archive it again",
    ),
    _Rule(
        "ValueError", r"^precision (?P<what>.*?) cannot run here",
        "the setting precision {what} cannot run on this machine with what the archive carries",
        "set serving.precision: auto in recipe.yaml of the run folder and archive it again",
    ),
    _Rule(
        "ValueError", r"^(?P<what>index_to_name\.json.*)$",
        "the labels cannot be used: {what}",
        f"restore index_to_name.json in the run folder: {_REBUILD}",
    ),
    _Rule(
        "JSONDecodeError", r"(?s)^(?P<what>.*)$",
        "index_to_name.json is not valid JSON: {what}",
        f"restore index_to_name.json in the run folder: {_REBUILD}",
    ),
    _Rule(
        "GoldenMismatch", r"^the golden answers cannot be read: (?P<what>.*)$",
        "the golden images or their answers cannot be read: {what}",
        f"restore golden/ in the run folder: {_REBUILD}",
    ),
    _Rule(
        "GoldenMismatch", r"^the model answers (?P<found>\[.*\]), training measured (?P<wanted>\[.*\])$",
        "model.pt has another number of classes than was measured: it answers {found} instead of {wanted}",
        f"put the run's own model.pt back: {_REBUILD}",
    ),
    _Rule(
        "RuntimeError|ValueError", r"maximum supported version|Unknown builtin op|Unknown type name|is too old",
        "model.pt was exported by a newer PyTorch than is installed here",
        "install the version of torch that sbom.cdx.json in the archive lists, or train and export with this one",
    ),
    _Rule(
        "RuntimeError|AssertionError|AcceleratorError|NotImplementedError",
        r"No CUDA GPUs|NVIDIA driver|not compiled with CUDA|CUDA device|'CUDA' backend|same device"
        "|invalid device ordinal|no kernel image",
        "the model or its worker asks for a device that it does not get here, such as a GPU",
        "export the model on the CPU with nothing tied to a device, and serve by config.cpu.properties without a GPU",
    ),
    _Rule(
        "NoGpu", "",
        "no GPU was used: PyTorch finds none, and the worker serves on the CPU",
        "look at nvidia-smi, CUDA_VISIBLE_DEVICES and whether this PyTorch was built for CUDA; without --gpu it is the "
        "CPU that is examined",
    ),
    _Rule(
        "RuntimeError", r"PytorchStreamReader|constants\.pkl|file in archive is not in a subdirectory",
        "model.pt is no TorchScript that can be read",
        f"put the run's own model.pt back: {_REBUILD}",
    ),
    _Rule(
        "AttributeError", r"'RecursiveScriptModule' object has no attribute '(?P<name>\w+)'",
        "model.pt has no {name}, which the handler uses: it was exported by another program, or by an older clone",
        f"put the run's own model.pt back: {_REBUILD}",
    ),
    _Rule(
        "PredictionFailed", r"^(?P<what>.*)$",
        "the worker loads, and then does not answer a golden image: {what}",
        "correct handler/ in the clone and archive the run again; --log shows all that the worker printed",
    ),
)  # fmt: skip


def diagnose(evidence: Evidence) -> Diagnosis:
    """Cause and fix, from the first exception that a rule knows; one that none knows is told as it is."""
    first = evidence.errors[0] if evidence.errors else None
    detail = _detail(first) if first else evidence.log.strip().rpartition("\n")[2]
    found = _of_process(evidence) or _of_findings(evidence)
    for error in () if found else evidence.errors:
        for rule in _RULES:
            match = re.search(rule.message, error["message"], flags=re.MULTILINE)
            if match and re.fullmatch(rule.error_type, error["type"]):
                groups = {name: " ".join(value.split()) for name, value in match.groupdict().items()}
                return Diagnosis(rule.cause.format(**groups), rule.fix, detail)
    if found:
        return Diagnosis(*found, detail)
    return Diagnosis(
        "the worker ended for a reason that is not known here",
        "look at the exception, and with --log at all that the worker printed",
        detail,
    )


def _detail(error: Mapping[str, str]) -> str:
    where = f" ({error['where']})" if error["where"] else ""
    return f"{error['type']}: {' '.join(error['message'].split())[:500]}{where}"


def _of_process(evidence: Evidence) -> tuple[str, str] | None:
    """Causes that leave no exception."""
    if evidence.timeout_s is not None:
        return (
            f"the worker was not ready after {evidence.timeout_s:g} s",
            "look with --log for where it hangs; a slow machine may need --timeout-s, TorchServe itself gives "
            f"{torchserve_defaults.TIMEOUT_S} s",
        )
    if evidence.errors or evidence.signal is None:
        return None
    limited = evidence.memory_limit_mb is not None and re.search(_MEMORY, evidence.log)
    if evidence.signal == signal.SIGKILL or limited:
        return (
            "the system killed the worker, as it does where memory runs out",
            _MORE_MEMORY,
        )
    return (
        f"the worker crashed ({signal.Signals(evidence.signal).name}) in native code",
        "install the versions that sbom.cdx.json in the archive lists; if it still crashes, look at --log",
    )


def _of_findings(evidence: Evidence) -> tuple[str, str] | None:
    """Causes that the archive's content tells better than the exception."""
    types = {error["type"] for error in evidence.errors}
    if "GoldenMismatch" not in types:
        return None
    served, measured = evidence.findings.get("label_counts", (0, 0))
    if served != measured:
        return (
            f"index_to_name.json has {served} labels, and {measured} were measured",
            f"restore index_to_name.json in the run folder: {_REBUILD}",
        )
    messages = " ".join(error["message"] for error in evidence.errors if error["type"] == "GoldenMismatch")
    if messages.startswith("labels are"):
        return (
            "the labels in index_to_name.json are not those that were measured, or stand in another order",
            f"restore index_to_name.json in the run folder: {_REBUILD}",
        )
    return _of_mismatch(evidence) if " instead of " in messages else None


def _of_mismatch(evidence: Evidence) -> tuple[str, str]:
    """Golden images got other probabilities: from other decoding or other weights."""
    would_match = evidence.findings.get("what_would_match", {})
    if would_match.get("channel_order"):
        return (
            "images reach the model with red and blue exchanged",
            "correct the channel order in handler/decoding.py of the clone and archive the run again",
        )
    if evidence.changed_files:
        return (
            "golden images are answered otherwise than measured: the weights in model.pt changed, or the decoding did "
            f"(the archive's {' and '.join(evidence.changed_files)} is not this clone's)",
            "archive the run again with the code that it was trained with",
        )
    return (
        "golden images are answered otherwise than measured: the weights in model.pt are not those of the run",
        f"put the run's own model.pt back: {_REBUILD}",
    )
