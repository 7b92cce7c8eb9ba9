"""The README's commands run as they stand, in a copy of the tracked files, and its answer is the server's."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import processes
from tests.conftest import CONFIG, ROOT, free_ports

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
[ANSWER] = re.findall(r"^```json\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Path]:
    """The project's files without anything that was made from them, and with the environment of this session."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    clone = tmp_path / "clone"
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, clone / name)
    if not (Path(sys.prefix) / "installed.lock").is_file():
        pytest.skip("the environment was not made by scripts/setup.sh")
    (clone / ".venv").symlink_to(sys.prefix)
    yield clone
    processes.stop(clone)


def on_ports(text: str, first: int) -> str:
    """`text` with the default ports moved, so that the test can run beside another server."""
    moved = {"8080": first, "8081": first + 1, "8082": first + 2, "7070": first + 3, "7071": first + 4}
    return re.sub(r"\b(8080|8081|8082|7070|7071)\b", lambda match: str(moved[match[1]]), text)


def test_the_commands_of_the_readme(clone: Path, tmp_path: Path) -> None:
    """Quickstart, the request, and the long way, in one shell, in the order in which they are read."""
    first = free_ports()
    for file in clone.glob("config/*.properties"):
        file.write_text(on_ports(file.read_text(), first))
    script = "\n".join(["set -euo pipefail", *BLOCKS])
    script = on_ports(script, first).replace("scripts/test.sh ", "true ")
    temp = tmp_path / "temp"
    temp.mkdir()
    environment = {**os.environ, "TORCHSERVE_URL": f"http://127.0.0.1:{first}", "TMPDIR": str(temp), "TEMP": str(temp)}
    finished = subprocess.run(
        ["bash", "-c", script], cwd=clone, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    output = finished.stdout

    accuracy = re.search(r"held-out accuracy: (\d+\.\d+)%", output)
    assert accuracy is not None
    assert float(accuracy[1]) >= 97
    answer = re.search(r"^\{.*?\}", output, flags=re.MULTILINE)
    assert answer is not None
    served, printed = json.loads(answer[0]), json.loads(ANSWER)
    assert len(served) == len(printed)
    best, probability = next(iter(printed.items()))
    assert served[best] == pytest.approx(probability, abs=0.05)
    assert "lenet5-digits: 2 workers ready" in output
    assert output.count("READY") == 2
    assert processes.find(clone) is None, "the last command stops the server"


def test_the_ports_of_the_readme_are_the_configured_ones() -> None:
    """The table and the configuration agree."""
    table = set(re.findall(r"\b(80\d\d|70\d\d)\b", "\n".join(re.findall(r"^\| \d{4}.*$", README, flags=re.MULTILINE))))
    assert table == set(re.findall(r"\b(80\d\d|70\d\d)\b", CONFIG.read_text()))


@pytest.mark.parametrize(
    "document", sorted(path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    """No relative link is dead."""
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", (ROOT / document).read_text()):
        assert (ROOT / document).parent.joinpath(target).exists(), f"{document} links to {target}"
