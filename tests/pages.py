"""The documents as tests read them: their blocks, and who runs the commands in each."""

from __future__ import annotations

import re

from tests.conftest import ROOT

PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/*/README.md")])
}
COMMANDS = ("bash", "console", "ini", "python")
"""Languages of blocks that somebody runs."""
SHOWN = ("json", "promql", "text", "yaml")
"""Languages of blocks that hold no command."""
RUN = "tests/test_docs_run.py::"
CLAIMS = {
    "README.md": {"": f"{RUN}test_the_readme"},
    "CONTRIBUTING.md": {"": "needs an hour, tests included: .ci/run is both commands"},
    "docs/archive.md": {
        "scripts/archive.sh": f"{RUN}test_archives",
        "python -m archive doctor": f"{RUN}test_archives",
        "python -m archive verify": f"{RUN}test_archives",
        "python -m pip install cryptography": f"{RUN}test_archives",
        "openssl": f"{RUN}test_archives",
        "python -m pip install 'ray[data]'": "needs 400 MB of packages: tests/test_score.py calls it where they are",
    },
    "docs/benchmarks.md": {"": "needs an hour and 3 GB: tests/test_benchmarks_serving.py measures in little"},
    "docs/client.md": {
        "python -m client predict": f"{RUN}test_the_client",
        "mkdir -p candidates": f"{RUN}test_a_new_version",
        "python -m client ready": f"{RUN}test_readiness_over_http",
        "python -m client load": f"{RUN}test_the_client",
        "python -m client tune": "needs minutes of a quiet machine: tests/test_tune.py tunes in less",
        "python -m pip install 'gradio": "needs another Pillow than the handler: tests/test_demo.py has an environment",
        "from pathlib": f"{RUN}test_the_client",
    },
    "docs/commands.md": {"$ python -m": "tests/test_docs.py::test_help_is_as_documented"},
    "docs/containers.md": {
        "docker build": "needs a Docker engine: deploy/docker/prove.sh carries the Dockerfile out without one",
        "openssl": "needs a Docker engine: tests/test_containers.py validates what it starts",
    },
    "docs/edge.md": {
        "cp -r deploy/nginx edge": "tests/test_edge.py::test_every_server_gets_requests",
        "curl": "tests/test_edge.py::test_tls_is_verified",
    },
    "docs/kubernetes.md": {"kubectl": "needs a cluster: tests/test_kubernetes.py validates what it applies"},
    "docs/leaving-torchserve.md": {
        "python -m archive export": "tests/test_homes.py::test_the_docs_commands_run",
        "import json": "tests/test_homes.py::test_the_docs_commands_run",
        "python -m archive compare": "tests/test_homes.py::test_compare_tells_the_changed_form_from_the_others",
        "scripts/archive.sh runs/NAME --quantise": "tests/test_quantise.py::test_the_archive_script_quantises_first",
    },
    "docs/monitoring.md": {
        "python -m client ready": "tests/test_monitoring.py::readiness_of",
        "prometheus": "tests/test_monitoring.py::prometheus",
        "promtool": "tests/test_monitoring.py::test_configuration_and_rules_are_valid",
    },
    "docs/operating.md": {
        "[Service]": "needs systemd: tests/test_server_supervise.py sends the command SIGTERM under load",
        "python -m client config": f"{RUN}test_operating",
        "scripts/serve.sh cpu --foreground": f"{RUN}test_operating",
    },
    "docs/own-images.md": {"": f"{RUN}test_your_own_images"},
    "docs/reliability.md": {"": "needs an hour and root: what it writes is this page, by scripts/torture.sh"},
    "docs/training.md": {
        "python -m train": f"{RUN}test_training",
        "torchrun --standalone": f"{RUN}test_training",
        "torchrun --nnodes": "needs two machines: tests/test_distributed.py has network namespaces for them",
        "export TORCH_DISABLE_SHARE": "needs two machines: tests/test_distributed.py has network namespaces for them",
    },
    "deploy/libtorch/README.md": {"": "tests/test_libtorch.py::test_the_readme"},
}
"""What runs the blocks of commands of a page, by their first words: a test or fixture, or none for want of what they
need: then who stands in for it."""


def fences(page: str) -> list[tuple[str, str]]:
    """Language and content of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)


def blocks(name: str, beginning: str = "", language: str = "bash") -> list[str]:
    """The blocks of a page that begin so, in their order; there must be one."""
    found = [content for of, content in fences(PAGES[name]) if of == language and content.startswith(beginning)]
    assert found, f"{name} has no block of {language} that begins with {beginning!r}"
    return found
