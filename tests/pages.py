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
README_TOLERANCE = 5e-4
"""Of a probability in README's answer: another processor's rounding moves it by less, another training by more."""
RUN = "tests/test_docs_run.py::"
CLAIMS = {
    "README.md": {"": f"{RUN}test_the_readme"},
    "CONTRIBUTING.md": {"": "needs an hour, tests included: .ci/run is both commands"},
    "docs/benchmarks.md": {
        "python -m benchmarks.serving": "needs an hour and 3 GB: tests/test_benchmarks_serving.py measures in little",
        "python -m benchmarks.gpu": "needs a GPU: tests/test_benchmarks_gpu.py tries all of it without",
        "python -m benchmarks.forms": "needs ten minutes: tests/test_benchmarks_forms.py measures in little",
        "apt-get": "needs half an hour: tests/test_benchmarks_finetuning.py has its figures and tables",
    },
    "docs/containers.md": {
        "docker build": "needs a Docker engine: deploy/docker/prove.sh carries the Dockerfile out without one",
        "openssl": "needs a Docker engine: tests/test_containers.py validates what it starts",
        "docker compose": "needs a Docker engine: tests/test_containers.py validates what it starts",
        "kubectl": "needs a cluster: tests/test_kubernetes.py validates what it applies",
    },
    "docs/edge.md": {
        "cp -r deploy/nginx edge": "tests/test_edge.py::test_every_server_gets_requests",
        "curl": "tests/test_edge.py::test_tls_is_verified",
    },
    "docs/from-your-model.md": {
        ". .venv/bin/activate": "tests/test_adopt.py::test_a_model_of_unknown_accuracy_is_archived_by_force_alone",
        "python -m train.adopt --architecture": "tests/test_adopt.py::colours",
        "python -m train.adopt old.mar": "tests/test_adopt_stock.py::test_it_answers_as_the_stock_handler",
        "python -m train.adopt last.ckpt": "tests/test_adopt_files.py::test_ones_own_network_and_checkpoint",
        "python -m train.adopt model.onnx": "tests/test_adopt_onnx.py::adopted",
        "python -m train.adopt model.pt": "tests/test_adopt_files.py::test_a_file_is_served_with_its_own_answers",
        "python -m benchmarks.stock": "needs ten minutes and wrk: tests/test_benchmarks_stock.py makes its table",
    },
    "docs/leaving-torchserve.md": {
        "python -m export": "tests/test_homes.py::test_the_docs_commands_run",
        "import json": "tests/test_homes.py::test_the_docs_commands_run",
        "python -m pip install 'ray[serve]'": "needs 400 MB of packages: tests/contract/test_ray.py has them",
        "export TORCHSERVE_URL": "needs Ray Serve: tests/contract/test_ray.py calls the client",
        "python -m export.compare": "tests/test_homes.py::test_compare_tells_the_changed_form_from_the_others",
        "scripts/archive.sh runs/NAME --quantise": "tests/test_quantise.py::test_the_archive_script_quantises_first",
    },
    "docs/monitoring.md": {
        "python -m operate ready": "tests/test_monitoring.py::readiness_of",
        ".venv/bin/python -m pip install opentelemetry": "needs a collector: tests/test_spans.py has its own",
        "python -m operate slow": "tests/test_trace.py::test_the_command_lists_the_slowest_first",
        "prometheus": "tests/test_monitoring.py::prometheus",
        "promtool": "tests/test_monitoring.py::test_configuration_and_rules_are_valid",
    },
    "docs/operating.md": {
        "scripts/archive.sh": f"{RUN}test_archives",
        "python -m archive doctor": f"{RUN}test_archives",
        "[Service]": "needs systemd: tests/test_server_supervise.py sends the command SIGTERM under load",
        "python -m server config": f"{RUN}test_operating",
        "scripts/serve.sh cpu --foreground": f"{RUN}test_operating",
        "export JAVA_HOME": f"{RUN}test_operating",
        "python -m operate ready lenet5-digits --golden": f"{RUN}test_the_client",
        "python -m operate ready lenet5-digits --http": f"{RUN}test_readiness_over_http",
        "python -m client scale": f"{RUN}test_the_client",
        "python -m operate load": f"{RUN}test_the_client",
        "python -m operate tune": "needs minutes of a quiet machine: tests/test_tune.py tunes in less",
        "mkdir -p candidates": f"{RUN}test_a_new_version",
    },
    "docs/tutorial.md": {
        ". .venv": f"{RUN}test_your_own_images",
        "python -m train.pick": "tests/test_pick.py::test_networks_are_tried_and_the_best_serves",
        "python -m train probe": "tests/test_unknown.py::test_a_run_is_measured_on_other_strangers",
    },
    "docs/reliability.md": {"": "needs an hour and root: what it writes is this page, by scripts/torture.sh"},
    "docs/requests.md": {
        "TOKEN=": f"{RUN}test_the_client",
        "python -m client predict": f"{RUN}test_the_client",
        "python -m client label": "needs gradio: tests/test_label.py has an environment with it",
        "python -m client evaluate lenet5-digits labelled/random": "needs labels: tests/test_label.py reads such",
        "python -m pip install .": "tests/test_package.py::test_the_client_installs_alone",
        "from pathlib": f"{RUN}test_the_client",
        "python -m operate grpc": "tests/test_grpc_door.py::test_a_stop_lets_calls_end",
        "import os": "tests/test_grpc_door.py::test_the_docs_example",
        "python -m venv .venv-demo": "needs another Pillow than the handler: tests/test_demo.py has an environment",
        "python -m pip install 'ray[data]'": "needs 400 MB of packages: tests/test_score.py calls it where they are",
    },
    "docs/security.md": {"": f"{RUN}test_archives"},
    "docs/training.md": {
        "python -m train lenet5": f"{RUN}test_training",
        "python -m train probe": "tests/test_probe.py::test_a_probe_is_a_run_like_any_other",
        "python -m train finetune --data photos": "tests/test_folds.py::test_every_image_is_measured_and_trained_on",
        "python -m train finetune --data labels": "tests/test_label_table.py::test_a_table_is_read_however_saved",
        "python -m archive relabel": "tests/test_relabel.py::test_every_file_has_the_new_names_and_back",
        "python -m train.compare": "tests/test_train_compare.py::test_figures_and_what_differs",
        "python -m train.evaluate": "tests/test_evaluate.py::test_a_server_says_the_same_as_the_run",
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
