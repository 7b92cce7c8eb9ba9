"""Read strictly what a call asks for that registers a model with a running TorchServe: `POST /models?KEY=VALUE&...`.

TorchServe ignores a parameter that it does not know, and takes its default for a value of a wrong type.
"""

from __future__ import annotations

from urllib.parse import parse_qsl

from server.errors import ConfigError
from server.keys import REGISTER_KEYS, Key
from server.properties import fits, unknown_key

_ABOVE_0 = ("batch_size", "response_timeout", "startup_timeout")


def parse(query: str) -> dict[str, str]:
    """The parameters of the call.

    Args:
        query: `url=NAME.mar&batch_size=8`, also with the address and the question mark before it.

    Raises:
        ConfigError: TorchServe would not do what the first wrong parameter says.
    """
    values: dict[str, str] = {}
    for key, value in parse_qsl(query.rpartition("?")[2], keep_blank_values=True):
        if problem := _problem(key, value, values):
            raise ConfigError(f"--register: {problem}")
        values[key] = value
    if "url" not in values:
        raise ConfigError("--register: expected url=NAME.mar, an archive of the model store")
    return values


def _problem(key: str, value: str, before: dict[str, str]) -> str | None:
    if key not in REGISTER_KEYS:
        return unknown_key(key, REGISTER_KEYS)
    if key in before:
        return f"{key} is given twice, of which TorchServe takes the first; expected one"
    known = Key(REGISTER_KEYS[key])
    if not fits(known, value):
        return f"{key}={value}: expected {known.expected}"
    return f"{key}={value}: expected 1 or more" if key in _ABOVE_0 and int(value) == 0 else None
