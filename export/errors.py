"""Why a model is not handed to another runtime: it cannot be had in that form, answers otherwise, or would replace
what no export wrote."""

from __future__ import annotations

from system.errors import KnownError


class ExportRefused(KnownError):
    """`python -m export` prints its message in one line and exits 1."""
