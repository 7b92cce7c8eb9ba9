"""Read a `.properties` file strictly: what TorchServe would swallow in silence is refused here.

TorchServe ignores a key that it does not know, and reads `true` with a blank after it as false. Of two equal keys the
last counts, here as there. Each refusal names file, line, key, and what was expected.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from urllib.parse import urlsplit

from server.errors import ConfigError
from server.keys import EXPECTED, KEYS, MODEL_KEYS, PORT_KEYS, Key, Kind, variable
from system.addresses import is_loopback

_VARIABLE = re.compile(r"\$\$([^$]+[^$])\$\$")
_LARGEST = 2**31 - 1
_ADDRESS = re.compile(r"https?://[^:/]+(:[0-9]+)?|unix:/.+")
_INTERFACE_KEYS = [key for key, known in KEYS.items() if known.kind in ("address", "host")]


@dataclass(frozen=True)
class Value:
    """What one key is set to, and where."""

    text: str
    where: str
    """`FILE:LINE`, or the environment variable."""


@dataclass(frozen=True)
class Properties:
    """A file's values, and everything that is wrong with them."""

    values: dict[str, Value]
    refusals: list[str]
    variables: frozenset[str] = frozenset()
    """The environment's, from which it has values."""

    def get(self, key: str) -> str | None:
        """The effective value: the environment's, the file's, or TorchServe's default."""
        return self.values[key].text if key in self.values else KEYS[key].default

    def is_true(self, key: str) -> bool:
        return (self.get(key) or "").lower() == "true"

    def check(self) -> None:
        """Raises:
        ConfigError: TorchServe would not do what the file says; the first reason, and how many more there are.
        """
        if self.refusals:
            first, *others = self.refusals
            more = f" (and {len(others)} more: python -m server config FILE shows them all)" if others else ""
            raise ConfigError(first + more)


def read(path: Path) -> Properties:
    """Raises:
    ConfigError: the file cannot be read.
    """
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"cannot read {path}: it is not text in UTF-8") from None


def parse(text: str, name: str) -> Properties:
    """The values in `text`, a file called `name`, with those of the environment where the file asks for them."""
    values: dict[str, Value] = {}
    refusals: list[str] = []
    variables: set[str] = set()
    for number, line in _logical_lines(text):
        where = f"{name}:{number}"
        key, equals, value = line.partition("=")
        if problem := _line_problem(line, key, equals):
            refusals.append(f"{where}: {problem}")
        if equals and key.strip() in KEYS:
            variables.update(_VARIABLE.findall(value))
            resolved = _VARIABLE.sub(lambda match: os.environ.get(match[1], match[0]), value.strip())
            values[key.strip()] = Value(resolved, where)
    if Properties(values, refusals).is_true("enable_envvars_config"):
        found = {key: os.environ[variable(key)] for key in KEYS if variable(key) in os.environ}
        values |= {key: Value(value, f"environment {variable(key)}") for key, value in found.items()}
        variables.update(map(variable, found))
    refusals += [f"{value.where}: {wrong}" for key, value in values.items() if (wrong := _type_problem(key, value))]
    properties = Properties(values, refusals, frozenset(variables))
    for check in (_without_tokens, _cors, _equal_ports, _models):
        refusals += check(properties)
    return properties


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Line number and text of each entry; a backslash at the end of a line goes on with the next one."""
    pending, first = "", 0
    for number, line in enumerate(text.split("\n"), start=1):
        if not pending:
            if not line.strip() or line.lstrip().startswith(("#", "!")):
                continue
            first = number
        pending += line.lstrip() if pending else line
        if (len(pending) - len(pending.rstrip("\\"))) % 2:
            pending = pending[:-1]
            continue
        yield first, pending
        pending = ""
    if pending:
        yield first, pending


def _line_problem(line: str, key: str, equals: str) -> str | None:
    """What is wrong with how the line is written."""
    if not equals:
        return f"{line.strip()!r}: expected KEY=VALUE"
    name = key.strip()
    if name not in KEYS:
        return unknown_key(name, KEYS)
    if key != name or line.partition("=")[2].startswith((" ", "\t")):
        return f"{name}: blank beside the = or before the key; expected KEY=VALUE"
    if line != line.rstrip():
        return f"{name}: blank after the value, which TorchServe takes for a part of it; expected none"
    if not line.isascii():
        return f"{name}: TorchServe reads another encoding; expected \\uXXXX for what is not ASCII"
    return None


def unknown_key(name: str, known: Iterable[str]) -> str:
    """What is wrong with a key that is none of the known ones, and which of them may be meant."""
    close = get_close_matches(name, known, n=1)
    return f"{name}: TorchServe 0.12 knows no such key" + (f"; did you mean {close[0]}?" if close else "")


def _type_problem(key: str, value: Value) -> str | None:
    known = KEYS[key]
    shown = "..." if known.secret else value.text
    if missing := _VARIABLE.search(value.text):
        return f"{key}={shown}: the environment has no variable {missing[1]}; set it, or write the value out"
    return None if fits(known, value.text) else f"{key}={shown}: expected {known.expected}"


def fits(known: Key, text: str) -> bool:
    """Whether TorchServe can read the text as what the key takes."""
    match known.kind:
        case "boolean":
            return text.lower() in ("true", "false")
        case "integer":
            return re.fullmatch("[0-9]+", text) is not None and int(text) <= max(_LARGEST, int(known.default or 0))
        case "number":
            return re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) is not None
        case "port":
            return re.fullmatch("[0-9]+", text) is not None and 1 <= int(text) < 65535
        case "address":
            return _ADDRESS.fullmatch(text) is not None and port_of("", text) < 65535
        case "host":
            return re.fullmatch(r"[\w.:-]+", text) is not None
        case "choice":
            return text.strip().lower() in known.choices
        case "json":
            return _is_json_object(text)
        case _:
            return True


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def port_of(key: str, text: str) -> int:
    """The port that a value of the kinds address and port opens; -1 for a Unix socket and for what cannot be read."""
    if text.isdigit():
        return int(text)
    if not _ADDRESS.fullmatch(text) or text.startswith("unix:"):
        return -1
    given = text.rpartition(":")[2]
    if given.isdigit():
        return int(given)
    default = KEYS[key].default if key in PORT_KEYS else None
    return int(default.rpartition(":")[2]) if default else 0


def _without_tokens(properties: Properties) -> Iterator[str]:
    if not properties.is_true("disable_token_authorization"):
        return
    line = f"{properties.values['disable_token_authorization'].where}: disable_token_authorization=true"
    is_open = False
    for key in _INTERFACE_KEYS:
        text = properties.get(key) or ""
        host = text if KEYS[key].kind == "host" else urlsplit(text).hostname
        if host and not is_loopback(host):
            is_open = True
            yield (
                f"{line} while {properties.values[key].where} has {key}={text}: "
                "anyone who reaches the port could use it; expected 127.0.0.1, or tokens left on"
            )
    if not is_open:
        yield f"{line}: our start, client and edge go by tokens; expected false, or no such line"


def _cors(properties: Properties) -> Iterator[str]:
    for key, value in properties.values.items():
        if key.startswith("cors_") and value.text:
            yield (
                f"{value.where}: {key}: TorchServe wants a token with a browser's OPTIONS, which has none; expected no "
                "such line: the edge answers pages of other origins (cors.conf, docs/edge.md)"
            )


def _equal_ports(properties: Properties) -> Iterator[str]:
    seen: dict[int, str] = {}
    for key in PORT_KEYS:
        port = port_of(key, properties.get(key) or "")
        if port > 0 and port in seen:
            value = properties.values.get(key) or properties.values[seen[port]]
            yield f"{value.where}: {key} and {seen[port]} both open port {port}; expected five different ports"
        seen.setdefault(port, key)


def _models(properties: Properties) -> Iterator[str]:
    """What is wrong within the key `models`."""
    value = properties.values.get("models")
    if value is None or not _is_json_object(value.text):
        return
    for name, versions in json.loads(value.text).items():
        for version, settings in versions.items() if isinstance(versions, dict) else [("", versions)]:
            where = f"{value.where}: models: {name}{version and f' {version}'}"
            if not version or not isinstance(settings, dict):
                yield f'{where}: {settings!r}: expected {{"NAME": {{"VERSION": {{"minWorkers": 1, ...}}}}}}'
                continue
            for key, setting in settings.items():
                if key not in MODEL_KEYS:
                    yield f"{where}: {unknown_key(key, MODEL_KEYS)}"
                elif not _is_of_kind(MODEL_KEYS[key], setting):
                    yield f"{where}: {key}: {setting!r}: expected {EXPECTED[MODEL_KEYS[key]]}"


def _is_of_kind(kind: Kind, value: object) -> bool:
    """Whether a JSON value is a boolean, a whole number of 0 or more, or text."""
    if kind == "integer":
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return isinstance(value, bool if kind == "boolean" else str)
