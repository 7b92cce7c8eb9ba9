"""One model in several homes: each gives the golden answers, or is not handed over."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from archive import serving
from archive.errors import IncompleteRun, InvalidName
from archive.run_folder import RunFolder
from export import __main__ as export_command
from export import compare as compare_command
from export import comparison, finished_run, formats, preprocessing, ray_serve, triton
from export.errors import ExportRefused
from export.finished_run import FinishedRun
from handler import variants
from handler.decoding import decode
from handler.settings import HandlerSettings
from server.launch import RunningServer
from system.cores import cores
from tests.commands import invoke
from tests.conftest import MODEL, ROOT
from tests.images import encode, gradient
from tests.listening import Quiet, key_file, listening

pytestmark = pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*:UserWarning")

# Everything a client knows is in the folder that it was given: the page's own lines, the model and the labels.
CLIENT = """
import json, sys
import onnxruntime
folder, image, lines = sys.argv[1:]
names = {"path": image}
exec(open(lines).read(), names)
session = onnxruntime.InferenceSession(folder + "/model.onnx")
[row] = session.run(None, {"images": names["images"]})[0]
labels = json.load(open(folder + "/index_to_name.json"))
print(json.dumps({labels[str(index)]: float(value) for index, value in enumerate(row)}))
"""


@pytest.fixture(scope="module")
def known(run: Path) -> FinishedRun:
    return finished_run.read(run)


@pytest.fixture(scope="module")
def repository(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository for Triton."""
    folder = tmp_path_factory.mktemp("triton")
    formats.export(run, "triton", folder, "digits")
    return folder


def change_torchscript(run: Path) -> None:
    """Another first layer in `model.pt`."""
    model = torch.jit.load(run / "model.pt")
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    model.save(run / "model.pt")


def change_exported_program(run: Path) -> None:
    """Another first layer in `model.pt2`."""
    program = torch.export.load(run / "model.pt2")
    with torch.no_grad():
        next(iter(program.state_dict.values())).mul_(1.5)
    torch.export.save(program, run / "model.pt2")


def the_lines(page: str) -> str:
    """The Python of `preprocessing.md`."""
    [lines] = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    return str(lines)


@pytest.mark.process
def test_a_client_with_the_folder_alone_gets_the_golden_answers(
    onnx_folder: Path, run: Path, known: FinishedRun, tmp_path: Path
) -> None:
    """ONNX Runtime, the page's own lines and the labels, in a process that knows nothing of this project."""
    (tmp_path / "lines.py").write_text(the_lines((onnx_folder / preprocessing.PAGE_FILE).read_text()))
    document = json.loads((run / "golden" / "golden.json").read_text())
    for name in list(document["probabilities"])[:3]:
        answered = subprocess.run(
            [sys.executable, "-c", CLIENT, onnx_folder, run / "golden" / name, tmp_path / "lines.py"],
            cwd=tmp_path, check=True, capture_output=True, text=True,
        )  # fmt: skip
        expected = dict(zip(document["class_names"], document["probabilities"][name], strict=True))
        assert json.loads(answered.stdout) == pytest.approx(expected, abs=formats.TOLERANCE)


def pictures() -> dict[str, bytes]:
    """Images of every kind that decoding treats in its own way."""
    turned = gradient(60, 40)
    exif = Image.Exif()
    exif[274] = 6
    sixteen_bit = Image.fromarray((torch.arange(48 * 40).reshape(40, 48) * 34 % 65536).to(torch.uint16).numpy())
    transparent = gradient(50, 40).convert("RGBA")
    transparent.putalpha(gradient(50, 40, "L"))
    return {
        "colour": encode(gradient(70, 50)),
        "grey": encode(gradient(50, 70, "L")),
        "palette": encode(gradient(64, 48).convert("P")),
        "CMYK": encode(gradient(64, 48).convert("CMYK"), "JPEG"),
        "transparent": encode(transparent),
        "16 bits": encode(sixteen_bit),
        "turned": encode(turned, "JPEG", exif=exif),
        "large": encode(gradient(1600, 1200), "JPEG"),
    }


@pytest.mark.parametrize("picture", list(pictures()))
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resize_mode", ["fused", "torchvision", "squash"])
def test_the_pages_lines_decode_as_the_handler_does(
    known: FinishedRun, tmp_path: Path, channels: Any, picture: str, resize_mode: Any
) -> None:
    """The same pixels, every one, for every kind of image."""
    settings = HandlerSettings(
        channels=channels,
        resize_size=40,
        crop_size=32,
        interpolation="bicubic",
        resize_mode=resize_mode,
        background="#804020",
    )
    data = pictures()[picture]
    (tmp_path / "image").write_bytes(data)
    names: dict[str, Any] = {"path": tmp_path / "image"}
    exec(the_lines(preprocessing.page(replace(known, settings=settings))), names)
    assert torch.equal(torch.from_numpy(names["images"].copy())[0], decode(data, settings))


@pytest.mark.slow
@pytest.mark.process
def test_the_docs_commands_run(run: Path, tmp_path: Path) -> None:
    """docs/leaving-torchserve.md, from a run folder to labels out of ONNX Runtime, with nothing else at hand."""
    page = (ROOT / "docs" / "leaving-torchserve.md").read_text()
    commands = re.search(r"^```bash\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert commands is not None
    for room in ("archive", "export", "handler", "networks", "system"):
        (tmp_path / room).symlink_to(ROOT / room)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / MODEL).symlink_to(run)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    for program in (["bash", "-ec", commands[1]], ["python", "-c", the_lines(page)]):
        finished = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr
    assert len(json.loads(finished.stdout.replace("'", '"'))) == 2
    assert (tmp_path / "homes" / "triton" / MODEL / triton.CONFIG_FILE).is_file()


def test_onnx_takes_any_batch(onnx_folder: Path, known: FinishedRun) -> None:
    """What came in a batch of two at export is answered in batches of one to seventeen."""
    predict = variants.load_onnx(onnx_folder / RunFolder.onnx)
    images = known.images.repeat(2, 1, 1, 1)
    for count in (1, 2, 5, 17):
        expected = known.probabilities.repeat(2, 1)[:count]
        assert torch.allclose(predict(images[:count]), expected, atol=formats.TOLERANCE)


def test_onnx_tells_nothing_of_the_machine_and_is_the_same_each_time(
    onnx_folder: Path, run: Path, tmp_path: Path
) -> None:
    """No path of a source file is in it, and a second export gives the same bytes."""
    written = (onnx_folder / RunFolder.onnx).read_bytes()
    assert b".py" not in written
    assert str(ROOT).encode() not in written
    formats.export(run, "onnx", tmp_path, MODEL)
    assert (tmp_path / RunFolder.onnx).read_bytes() == written


def test_triton_is_told_what_the_model_is(repository: Path, known: FinishedRun) -> None:
    """Triton's own schema reads config.pbtxt, and its tensors are those of the ONNX file, its labels the classes."""
    pytest.importorskip("tritonclient", reason="the package tritonclient is not installed")
    import onnxruntime
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    model = repository / "digits"
    schema: Any = model_config_pb2
    config = text_format.Parse((model / triton.CONFIG_FILE).read_text(), schema.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == ("digits", "onnxruntime", 8)
    assert config.dynamic_batching.max_queue_delay_microseconds == 1000
    session = onnxruntime.InferenceSession(model / triton.VERSION / RunFolder.onnx)
    kinds = {"tensor(uint8)": schema.TYPE_UINT8, "tensor(float)": schema.TYPE_FP32}
    for told, is_so in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in told] == [
            (tensor.name, kinds[tensor.type], tensor.shape[1:]) for tensor in is_so
        ]
    assert (model / config.output[0].label_filename).read_text().splitlines() == known.class_names
    with pytest.raises(text_format.ParseError, match="max_batch"):
        text_format.Parse(triton.config(known, "digits").replace("max_batch_size", "max_batch"), schema.ModelConfig())


def test_a_second_export_takes_the_place_of_the_first(repository: Path, run: Path, tmp_path: Path) -> None:
    """A model folder is replaced as a whole, and nothing is left beside it."""
    folder = Path(shutil.copytree(repository, tmp_path / "repository"))
    (folder / "digits" / triton.LABELS_FILE).write_text("old\n")
    formats.export(run, "triton", folder, "digits")
    assert [path.name for path in folder.iterdir()] == ["digits"]
    assert (folder / "digits" / triton.LABELS_FILE).read_text() == (repository / "digits" / "labels.txt").read_text()


def content(folder: Path) -> dict[str, bytes]:
    """Every file below, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_folder_is_not_replaced_by_its_model(own_run: Path) -> None:
    """With the folder of the runs as target, DIR/NAME is the run itself: refused, and nothing of it is touched."""
    before = content(own_run.parent)
    with pytest.raises(ExportRefused, match=f"{own_run} is there and holds what no export wrote"):
        formats.export(own_run, "triton", own_run.parent, own_run.name)
    assert content(own_run.parent) == before


@pytest.mark.parametrize("foreign", ["2/model.onnx", "1/model.plan", "notes.txt"])
def test_what_else_lies_in_a_triton_model_is_kept(repository: Path, run: Path, tmp_path: Path, foreign: str) -> None:
    """Another version or any other file: refused, since the folder is replaced as a whole."""
    folder = Path(shutil.copytree(repository, tmp_path / "repository"))
    (folder / "digits" / foreign).parent.mkdir(exist_ok=True)
    (folder / "digits" / foreign).write_text("foreign")
    before = content(folder)
    with pytest.raises(ExportRefused, match="holds what no export wrote"):
        formats.export(run, "triton", folder, "digits")
    assert content(folder) == before


def test_a_triton_model_of_another_making_is_kept(run: Path, tmp_path: Path) -> None:
    """It has the same files, but for those that only an export writes."""
    for name in ("config.pbtxt", "labels.txt", "1/model.onnx"):
        (tmp_path / "digits" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "digits" / name).write_text("foreign")
    before = content(tmp_path)
    with pytest.raises(ExportRefused, match="holds what no export wrote"):
        formats.export(run, "triton", tmp_path, "digits")
    assert content(tmp_path) == before


@pytest.mark.process
def test_a_ray_application_has_all_that_it_imports(run: Path, tmp_path: Path) -> None:
    """Without TorchServe and without this clone; tests/contract/test_ray.py starts it where Ray is."""
    formats.export(run, "ray", tmp_path, "digits", "2.1")
    source = "import sys; sys.modules['ts'] = None; import handler.classifier, handler.fields; print(handler.__file__)"
    finished = subprocess.run(
        [sys.executable, "-c", source], cwd=tmp_path / "digits", capture_output=True, text=True, check=True
    )
    assert finished.stdout == f"{tmp_path}/digits/handler/__init__.py\n"
    assert "onnxruntime" not in (tmp_path / "digits" / "requirements.txt").read_text(), "which only ONNX needs"
    [application] = yaml.safe_load((tmp_path / "digits" / "serve.yaml").read_text())["applications"]
    assert application["args"] == {"name": "digits", "version": "2.1"}
    assert application["deployments"][0]["num_replicas"] == 1, "as the recipe's serving.workers"


def test_replicas_follow_the_recipe(own_run: Path) -> None:
    """Without `serving.workers` Ray scales with the load, up to the cores; the queue is as long as under TorchServe."""
    serving.change(own_run, workers=None, threads=2, torchserve={"jobQueueSize": 7})
    [deployment] = ray_serve.config(serving.read(own_run), "digits")["applications"][0]["deployments"]
    assert "num_replicas" not in deployment
    assert deployment["autoscaling_config"]["max_replicas"] == cores()
    assert deployment["ray_actor_options"] == {"num_cpus": 2}
    assert deployment["max_queued_requests"] == 7


def test_a_second_ray_export_keeps_settings_and_token(run: Path, tmp_path: Path) -> None:
    """All else is replaced, and what no export wrote is refused."""
    folder = tmp_path / "digits"
    formats.export(run, "ray", tmp_path, "digits")
    for name, old, new in (("serve.yaml", "port: 8080", "port: 9090"), ("app.py", "import", "xyzzy")):
        (folder / name).write_text((folder / name).read_text().replace(old, new))
    (folder / "key_file.json").write_text("{}")
    formats.export(run, "ray", tmp_path, "digits", "1.1")
    document = yaml.safe_load((folder / "serve.yaml").read_text())
    assert (document["http_options"]["port"], document["applications"][0]["args"]["version"]) == (9090, "1.1")
    assert (folder / "key_file.json").read_text() == "{}"
    assert "xyzzy" not in (folder / "app.py").read_text()
    (folder / "serve.yaml").unlink()
    with pytest.raises(ExportRefused, match="digits is there and no export wrote it"):
        formats.export(run, "ray", tmp_path, "digits")


def lay_a_file(folder: Path) -> None:
    """Somebody's own model of the same name."""
    folder.mkdir()
    (folder / "model.pt2").write_text("foreign")


def lay_a_folder(folder: Path) -> None:
    """A directory of that name, in a folder with an earlier export."""
    (folder / "model.pt2").mkdir(parents=True)
    (folder / "model.pt2" / "notes.txt").write_text("foreign")
    (folder / preprocessing.JSON_FILE).write_text("{}")


def lay_another_run(folder: Path) -> None:
    """A run folder with an export of its own."""
    folder.mkdir()
    for name in ("model.pt2", "model-config.yaml", preprocessing.JSON_FILE):
        (folder / name).write_text("foreign")


@pytest.mark.parametrize("lay", [lay_a_file, lay_a_folder, lay_another_run])
def test_files_that_no_export_wrote_are_kept(run: Path, tmp_path: Path, lay: Callable[[Path], None]) -> None:
    """Refused by name, and nothing is written beside them."""
    lay(tmp_path / "out")
    before = content(tmp_path)
    with pytest.raises(ExportRefused, match=r"model\.pt2 is there and no export wrote it"):
        formats.export(run, "pt2", tmp_path / "out", MODEL)
    assert content(tmp_path) == before


def test_a_run_folder_takes_its_own_exports(own_run: Path) -> None:
    """As docs/leaving-torchserve.md asks for: what training wrote stays, and a second export replaces the first."""
    trained = content(own_run)
    for _ in range(2):
        formats.export(own_run, "onnx", own_run, MODEL)
        assert content(own_run).items() > trained.items()
        (own_run / RunFolder.onnx).write_text("an older one")
    formats.export(own_run, "onnx", own_run, MODEL)
    assert (own_run / RunFolder.onnx).stat().st_size > 1000


@pytest.mark.parametrize("to", ["torchscript", "pt2"])
def test_pytorchs_own_files_are_handed_over_with_their_page(run: Path, tmp_path: Path, to: str) -> None:
    """The file of the run folder, byte for byte, with labels and preprocessing."""
    written, difference = formats.export(run, to, tmp_path / "new" / "folder", MODEL)
    names = {path.name: path for path in written}
    assert difference <= 1e-6
    [model] = set(names) - {"index_to_name.json", preprocessing.JSON_FILE, preprocessing.PAGE_FILE}
    assert names[model].read_bytes() == (run / model).read_bytes()
    assert json.loads(names[preprocessing.JSON_FILE].read_text())["input"]["shape"] == [None, 1, 32, 32]


@pytest.mark.parametrize(
    ("change", "to"),
    [
        (change_torchscript, "torchscript"),
        (change_exported_program, "pt2"),
        (change_exported_program, "onnx"),
        (change_exported_program, "triton"),
    ],
)
def test_a_model_that_answers_otherwise_is_not_handed_over(
    own_run: Path, tmp_path: Path, change: Callable[[Path], None], to: str
) -> None:
    """One layer's weights a twentieth larger: refused with the difference, and the folder stays empty."""
    change(own_run)
    with pytest.raises(ExportRefused, match=r"moves a golden probability by \d\.\de-0\d, allowed 1e-04"):
        formats.export(own_run, to, tmp_path / "out", MODEL)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_cannot_be_exported_is_said_first(own_run: Path, tmp_path: Path) -> None:
    """An incomplete run and a name that leads elsewhere: nothing is written."""
    with pytest.raises(InvalidName):
        formats.export(own_run, "triton", tmp_path / "out", "../escape")
    (own_run / "model.pt2").unlink()
    with pytest.raises(IncompleteRun, match=r"lacks model\.pt2"):
        formats.export(own_run, "onnx", tmp_path / "out", MODEL)
    assert not (tmp_path / "out").exists()


def test_the_commands_offer_what_there_is() -> None:
    """Their choices are named without loading torch, and are those that exist."""
    assert set(export_command.FORMATS) == set(formats.FORMATS)
    assert set(compare_command.FORMS) == {*comparison.FORMS, "torchserve"}
    assert compare_command.TOLERANCE == formats.TOLERANCE


def test_every_form_answers_as_measured(int8_run: Path) -> None:
    """What needs no compiler: fp32 within rounding of fp32, bf16 and int8 within theirs, and not equal."""
    found = {home.form: home for home in comparison.compare(int8_run, ["torchscript", "frozen", "bf16", "int8", "pt2"])}
    assert all(home.passed for home in found.values())
    assert all(found[form].difference <= 1e-5 for form in ("torchscript", "frozen", "pt2"))
    assert all(1e-5 < found[form].difference <= 0.05 for form in ("bf16", "int8"))


@pytest.mark.slow
@pytest.mark.process
def test_what_must_be_compiled_answers_as_measured(run: Path) -> None:
    """AOTInductor's library and the C++ program on LibTorch."""
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler {compiler}")
    aotinductor, libtorch = comparison.compare(run, ["aotinductor", "libtorch"])
    assert (aotinductor.failure, libtorch.failure) == ("", "")
    assert aotinductor.difference is not None and aotinductor.difference <= 1e-5
    assert libtorch.difference is not None and libtorch.difference <= 1e-5


def test_what_is_not_here_says_why(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler, no int8 file, no server: three reasons and no failure."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    forms = ["aotinductor", "libtorch", "int8", "torchserve"]
    found = {home.form: home for home in comparison.compare(run, forms)}
    assert found["aotinductor"].not_here == found["libtorch"].not_here == "no C++ compiler no-such-compiler"
    assert "--quantise" in found["int8"].not_here
    assert "--url" in found["torchserve"].not_here
    assert all(home.passed for home in found.values())


def test_compare_tells_the_changed_form_from_the_others(own_run: Path) -> None:
    """Changed weights in model.pt fail what is made of it, by number or reason, and model.pt2 passes."""
    change_torchscript(own_run)
    finished = invoke(
        compare_command.app, own_run, "--json", *(f"--only={form}" for form in ("torchscript", "frozen", "pt2"))
    )
    torchscript, frozen, pt2 = json.loads(finished.stdout)
    assert torchscript["difference"] > torchscript["tolerance"]
    assert frozen["difference"] > frozen["tolerance"]
    assert [form["passed"] for form in (torchscript, frozen, pt2)] == [False, False, True]
    assert finished.exit_code == 1
    assert finished.stderr == f"error: {own_run}: not what training measured: torchscript, frozen\n"


def test_the_commands_print_what_they_did(run: Path, tmp_path: Path) -> None:
    """A line for each file, a table for each form, one line for a mistake."""
    exported = invoke(export_command.app, run, tmp_path, "--to", "pt2")
    assert exported.exit_code == 0, exported.stderr
    assert str(tmp_path / "model.pt2") in exported.stdout
    compared = invoke(compare_command.app, run, "--only", "pt2")
    assert compared.exit_code == 0, compared.stderr
    assert re.search(r"^pt2 +\S+ +0\.0001 +pass *$", compared.stdout, flags=re.MULTILINE)
    for arguments, complaint in (
        (
            [export_command.app, run, tmp_path, "--to", "tflite"],
            "error: --to tflite: use one of torchscript, pt2, onnx, triton",
        ),
        ([compare_command.app, run, "--only", "tflite"], "error: --only tflite: use one of torchscript, frozen, bf16"),
        ([compare_command.app, tmp_path / "nowhere"], f"error: no run folder {tmp_path}/nowhere: "),
    ):
        finished = invoke(*arguments)
        assert finished.exit_code == 1
        assert finished.stderr.startswith(complaint)
        assert len(finished.stderr.splitlines()) == 1


def test_a_running_torchserve_answers_as_measured(torchserve: RunningServer, run: Path) -> None:
    """Over HTTP, with its tokens; another name is a failure and not a silence."""
    url, key_file = torchserve.inference_url, torchserve.key_file
    [served] = comparison.compare(run, ["torchserve"], comparison.Served(url, MODEL, key_file))
    assert served.failure == ""
    assert served.difference is not None and served.difference <= formats.TOLERANCE
    [missing] = comparison.compare(run, ["torchserve"], comparison.Served(url, "nobody", key_file))
    assert not missing.passed
    assert missing.failure.startswith("ModelNotFound: ")


def test_a_token_that_cannot_be_renewed_is_said(torchserve: RunningServer, run: Path, tmp_path: Path) -> None:
    """A key file without the API key, after an hour."""
    old = key_file(tmp_path, inference={"key": "expired"})
    [refused] = comparison.compare(run, ["torchserve"], comparison.Served(torchserve.inference_url, MODEL, old))
    assert not refused.passed
    assert refused.failure.startswith(f"NotAuthorized: the inference token in {old} is refused and cannot be renewed")


@pytest.mark.parametrize(("tolerance", "passed"), [((), False), (("--tolerance", "0.05"), True)])
def test_a_worker_in_lower_precision_is_allowed_more(
    known: FinishedRun, tmp_path: Path, tolerance: tuple[str, ...], passed: bool
) -> None:
    """Probabilities 0.01 away pass where that is asked for, and fail where it is not."""
    answers = dict(zip(known.encoded, (known.probabilities + 0.01).tolist(), strict=True))

    class Rounding(Quiet):
        def do_POST(self) -> None:
            image = self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(dict(zip(known.class_names, answers[image], strict=True)))

    tokens = key_file(tmp_path, inference={"key": "token"})
    with listening(Rounding) as url:
        finished = invoke(
            compare_command.app, known.run, "--only=torchserve", "--url", url, "--key-file", tokens, *tolerance
        )
    assert (finished.exit_code == 0) is passed, finished.stderr
    assert re.search(
        rf"^torchserve +1\.0e-02 +\S+ +{'pass' if passed else 'FAIL'}", finished.stdout, flags=re.MULTILINE
    )
