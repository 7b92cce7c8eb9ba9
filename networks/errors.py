"""What can be wrong with a network, each with a message that says what and what to do."""

from __future__ import annotations

from system.errors import KnownError


class ModelError(KnownError):
    """A network or weights that cannot be had."""


class ExportError(KnownError):
    """The exported model does not answer as the trained one."""
