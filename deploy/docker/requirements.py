"""What an image installs, from the lock files.

    python deploy/docker/requirements.py cpu

prints requirements with versions and hashes for `pip install --require-hashes --no-deps`. PyTorch for the CPU alone is
another build than the locked one, with hashes of its own: `cpu` leaves it out, and `torch` prints its locked versions.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
_TORCH = {"torch", "torchvision"}
_OF_CUDA = re.compile(r"(nvidia|cuda)-.*|triton")
# Signatures of archives are checked with these, which only the development lock has.
_SIGNATURES = {"cffi", "cryptography", "pycparser"}
KINDS = ("cpu", "gpu", "torch")


def requirements(kind: str, lock: str, development_lock: str) -> str:
    """The entries of a kind of image, in a requirements file's format."""
    locked, others = _entries(lock), _entries(development_lock)
    if kind == "torch":
        return "".join(entry.partition(" \\\n")[0] + "\n" for name, entry in locked if name in _TORCH)
    if kind == "cpu":
        locked = [(name, entry) for name, entry in locked if name not in _TORCH and not _OF_CUDA.fullmatch(name)]
    names = {name for name, _ in locked}
    signatures = [(name, entry) for name, entry in others if name in _SIGNATURES - names]
    return "".join(entry for _, entry in locked + signatures)


def _entries(lock: str) -> list[tuple[str, str]]:
    """Name and text of each requirement; a name may come twice, for different versions of Python."""
    found = re.finditer(r"^([a-z0-9-]+)==.*\n(?:[ \t].*\n)*", lock, flags=re.MULTILINE)
    return [(match[1], match[0]) for match in found]


def main() -> None:
    """Print the requirements of the kind that the command line names."""
    if len(sys.argv) != 2 or sys.argv[1] not in KINDS:
        sys.exit(f"usage: python deploy/docker/requirements.py {'|'.join(KINDS)}")
    locks = [(ROOT / name).read_text(encoding="utf-8") for name in ("requirements.lock", "requirements-dev.lock")]
    print(requirements(sys.argv[1], *locks), end="")


if __name__ == "__main__":
    main()
