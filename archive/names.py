"""How a model and its version may be called, for whoever builds an archive and whoever checks one."""

from __future__ import annotations

import re

from archive.errors import InvalidName

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VERSION = re.compile(r"[0-9]+(\.[0-9]+){0,3}")


def check_name(name: str, version: str) -> None:
    """Raises:
    InvalidName: TorchServe could not serve or manage a model of that name or version.
    """
    if not _NAME.fullmatch(name):
        raise InvalidName(f"model name {name!r}: use letters, digits, '.', '_' and '-', a letter or digit first")
    if "token" in name.lower():
        raise InvalidName(f"model name {name!r}: TorchServe takes management calls on it for token requests")
    if not _VERSION.fullmatch(version):
        raise InvalidName(f"version {version!r}: use numbers and dots, such as 1.0")
