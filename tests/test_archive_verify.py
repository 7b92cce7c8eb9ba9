"""An archive that is not as it was built is refused before anything of it is unpacked or run."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import socket
import stat
import struct
import subprocess
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from archive import canonical, doctor, sign
from archive.content import ArchiveContent
from archive.errors import ArchiveError, InvalidArchive, SignatureError
from archive.verify import opened, verify
from server import environment, launch, processes
from server.errors import ConfigError, PortTaken
from tests.broken import repacked
from tests.conftest import CONFIG, MODEL, free_ports, run_module

NAME = f"{MODEL}.mar"


@pytest.fixture
def archive(model_store: Path, tmp_path: Path) -> Path:
    """A copy of the good archive, alone in a model store."""
    store = tmp_path / "store"
    store.mkdir()
    return Path(shutil.copy2(model_store / NAME, store / NAME))


@pytest.fixture(scope="module")
def private_key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    key = tmp_path_factory.mktemp("keys") / "key"
    sign.keygen(key)
    return key


def members(archive: Path) -> set[str]:
    """Their names, of an archive with a perfect layout."""
    with archive.open("rb") as file:
        return set(canonical.read(archive, file))


def append(archive: Path, name: str, content: bytes, mode: int = 0o100644, compress: int = zipfile.ZIP_STORED) -> None:
    """Add a member as any ZIP tool would."""
    info = zipfile.ZipInfo()
    info.filename = name  # given above, it would be cut off at a NUL
    info.external_attr = mode << 16
    with zipfile.ZipFile(archive, "a") as added:
        added.writestr(info, content, compress_type=compress)


def directory_offset(archive: bytes) -> int:
    """Where the end record says that the directory begins."""
    [offset] = struct.unpack_from("<I", archive, len(archive) - 6)
    return int(offset)


def test_a_good_archive_says_what_it_is(archive: Path) -> None:
    """Name, version, and a digest that is the SHA-256 of `digests.json`."""
    verified = verify(archive)
    with zipfile.ZipFile(archive) as good:
        digests = good.read("digests.json")
        listed = json.loads(digests)["members"]
        assert set(listed) == set(good.namelist()) - {"digests.json"}
        for name, entry in listed.items():
            content = good.read(name)
            assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    assert (verified.model_name, verified.version, verified.signed) == (MODEL, "1.0", False)
    assert verified.digest == hashlib.sha256(digests).hexdigest()


@pytest.mark.slow
def test_every_flipped_byte_is_seen(archive: Path) -> None:
    """Content, headers, directory and end: there is no byte that could be another."""
    good = archive.read_bytes()
    directory = directory_offset(good)
    positions = [*range(0, 200), *range(200, len(good), 1009), *range(directory, len(good))]
    for position in positions:
        changed = bytearray(good)
        changed[position] ^= 0x20
        archive.write_bytes(changed)
        with pytest.raises(InvalidArchive):
            verify(archive)
    archive.write_bytes(good)
    verify(archive)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_is_cut_or_inserted_is_refused(archive: Path, model_store: Path, data: st.DataObject) -> None:
    """Any other file ends in the one kind of error, never in another exception."""
    good = (model_store / NAME).read_bytes()
    start = data.draw(st.integers(0, len(good)), label="start")
    end = data.draw(st.integers(start, min(len(good), start + 300)), label="end")
    inserted = data.draw(st.binary(max_size=60) | st.sampled_from([b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\7"]))
    changed = good[:start] + inserted + good[end:]
    assume(changed != good)
    archive.write_bytes(changed)
    with pytest.raises(InvalidArchive):
        verify(archive)


def test_a_changed_member_is_named(archive: Path, tmp_path: Path) -> None:
    """A flipped bit of the model, with its checksum mended, is still not what `digests.json` says."""

    def flip(content: Path) -> None:
        model = bytearray((content / "model.pt").read_bytes())
        model[len(model) // 2] ^= 1
        (content / "model.pt").write_bytes(model)

    changed = rewritten(archive, tmp_path, flip)
    assert changed.stat().st_size == archive.stat().st_size
    assert members(changed) == members(archive), "the control: the layout is perfect"
    with pytest.raises(InvalidArchive, match=r"'model\.pt' is not what digests\.json says"):
        verify(changed)


def zip_again(archive: Path) -> None:
    """Unpack and pack as a zip tool does, with the dates and permissions of today."""
    with zipfile.ZipFile(archive) as old:
        contents = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(archive, "w") as new:
        for name, content in contents.items():
            new.writestr(name, content)


def comment(archive: Path) -> None:
    with zipfile.ZipFile(archive, "a") as commented:
        commented.comment = b"PK"


ATTACKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "climbs out": (lambda archive: append(archive, "../x", b"x"), r"'\.\./x' climbs out"),
    "climbs out of a folder": (lambda archive: append(archive, "golden/../../x", b"x"), "climbs out"),
    "absolute": (lambda archive: append(archive, "/tmp/x", b"x"), "absolute path"),
    "drive": (lambda archive: append(archive, "C:x", b"x"), "absolute path"),
    "backslash": (lambda archive: append(archive, "golden\\..\\x", b"x"), "backslash"),
    "cut off name": (lambda archive: append(archive, "golden/x\0.png", b"x"), "control character"),
    "folder": (lambda archive: append(archive, "golden/more/", b""), "folder"),
    "symbolic link": (
        lambda archive: append(archive, "golden/link", b"/etc/passwd", stat.S_IFLNK | 0o777), "symbolic link",
    ),
    "deep path": (lambda archive: append(archive, "golden/" + "x/" * 1_000 + "x", b"x"), "stored as archive build"),
    "name that no file can have": (lambda archive: append(archive, f"golden/{'x' * 300}", b"x"), "longer than the 255"),
    "device": (lambda archive: append(archive, "golden/device", b"", stat.S_IFCHR | 0o666), "special file"),
    "bomb": (
        lambda archive: append(archive, "golden/bomb.png", bytes(50_000_000), compress=zipfile.ZIP_DEFLATED),
        r"'golden/bomb\.png' is compressed, \d{5} bytes that unpack to 50000000",
    ),
    "extra member": (lambda archive: append(archive, "golden/extra.png", b"x"), "stored as archive build"),
    "zipped again": (zip_again, "stored as archive build"),
    "trailing bytes": (lambda archive: archive.write_bytes(archive.read_bytes() + b"x"), "follows its end"),
    "leading bytes": (lambda archive: archive.write_bytes(b"x" + archive.read_bytes()), "stored as archive build"),
    "comment": (comment, "follows its end"),
    "cut short": (lambda archive: archive.write_bytes(archive.read_bytes()[:-1000]), "cut short"),
    "no archive": (lambda archive: archive.write_bytes(b"something else"), "not a ZIP file"),
    "empty": (lambda archive: archive.write_bytes(b""), "not a ZIP file"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("attack", ATTACKS)
def test_what_a_zip_tool_adds_is_refused_by_name(archive: Path, tmp_path: Path, attack: str) -> None:
    """Paths that lead out, links, devices, bombs and additions, each with its own words; nothing is unpacked."""
    change, complaint = ATTACKS[attack]
    change(archive)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InvalidArchive, match=complaint):
        verify(archive)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_comes_twice_is_refused(archive: Path) -> None:
    """Readers disagree on which of two members of one name they take."""
    append(archive, "model.pt", b"another")
    with pytest.raises(InvalidArchive, match=r"'model\.pt' comes twice"):
        verify(archive)


def test_too_many_members_are_refused_without_reading_them(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the directory lists; the control passes."""
    with zipfile.ZipFile(archive, "w") as many:
        for number in range(canonical.MAX_MEMBERS + 1):
            many.writestr(f"golden/{number:05}.png", b"")
    with pytest.raises(InvalidArchive, match="lists 2001 members"):
        verify(archive)
    some = archive.with_name("some.mar")
    canonical.write({f"golden/{number}": archive for number in range(4)}, some)
    assert len(members(some)) == 4
    monkeypatch.setattr(canonical, "MAX_MEMBERS", 3)
    with pytest.raises(InvalidArchive, match="more than the 3"):
        members(some)


def headers(archive: bytes, name: str) -> tuple[int, int]:
    """Where the header of a member begins, and its record in the directory."""
    local = archive.index(b"PK\3\4", max(0, archive.index(name.encode()) - 30))
    record = archive.index(name.encode(), directory_offset(archive)) - 46
    assert archive[record : record + 4] == b"PK\1\2"
    return local, record


@pytest.mark.parametrize(
    ("places", "complaint"),
    [
        ("both", "claims 3000000000 bytes"),
        ("directory", "claims 3000000000 bytes"),
        ("front", "stored as archive build"),
    ],
)
def test_a_member_that_claims_more_than_there_is_is_refused(archive: Path, places: str, complaint: str) -> None:
    """A lying size is found from the file's length, before anything of that size is read."""
    lying = bytearray(archive.read_bytes())
    local, record = headers(lying, "model.pt")
    if places != "directory":
        struct.pack_into("<II", lying, local + 18, 3_000_000_000, 3_000_000_000)
    if places != "front":
        struct.pack_into("<II", lying, record + 20, 3_000_000_000, 3_000_000_000)
    archive.write_bytes(lying)
    with pytest.raises(InvalidArchive, match=complaint):
        verify(archive)


def test_members_that_share_their_bytes_are_refused_before_they_are_read(archive: Path, tmp_path: Path) -> None:
    """A thousand records of one large member would have every reader of the directory unpack it a thousand times."""
    large = tmp_path / "large"
    large.write_bytes(bytes(1_000_000))
    canonical.write({"golden/0000.png": large}, archive)
    good = archive.read_bytes()
    start = directory_offset(good)
    record, end = good[start:-22], bytearray(good[-22:])
    records = b"".join(record.replace(b"0000", b"%04d" % number) for number in range(1_000))
    struct.pack_into("<HHI", end, 8, 1_000, 1_000, len(records))
    archive.write_bytes(good[:start] + records + end)
    with zipfile.ZipFile(archive) as seen:
        assert len(seen.namelist()) == 1_000
    with pytest.raises(InvalidArchive, match="all members 1000000000 of the file's"):
        verify(archive)


def test_the_directory_is_not_taken_into_memory_whatever_its_size(archive: Path) -> None:
    """One of 8 MB is refused before it is read."""
    with zipfile.ZipFile(archive, "w") as many:
        for number in range(40):
            info = zipfile.ZipInfo(f"golden/{number}.png")
            info.comment = bytes(60_000)
            many.writestr(info, b"")
    tracemalloc.start()
    with pytest.raises(InvalidArchive, match="directory of"):
        verify(archive)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_a_large_archive_is_verified_in_little_memory(archive: Path, tmp_path: Path) -> None:
    """Members of 100 MB are read in parts, the exported model's directory among them."""

    def grow(content: Path) -> None:
        with zipfile.ZipFile(content / "model.pt", "a") as model, model.open("model/data/more", "w") as more:
            for _ in range(100):
                more.write(bytes(1_000_000))

    large = repacked(archive, tmp_path, grow)
    tracemalloc.start()
    assert verify(large).size_bytes > 100_000_000
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_records_of_a_larger_file_are_refused(archive: Path) -> None:
    """ZIP64 records that say the same or something else: one reader would take them and another would not."""
    good = archive.read_bytes()
    [count, size, offset] = struct.unpack("<HII", good[-12:-2])
    record = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, offset)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(good) - 22, 1)
    archive.write_bytes(good[:-22] + record + locator + good[-22:])
    with zipfile.ZipFile(archive) as seen:
        assert seen.testzip() is None
    with pytest.raises(InvalidArchive, match="something follows"):
        verify(archive)
    lying = bytearray(good)
    _, place = headers(good, "model.pt")
    struct.pack_into("<I", lying, place + 24, 0xFFFFFFFF)
    archive.write_bytes(lying)
    with pytest.raises(InvalidArchive):
        verify(archive)


def test_a_member_that_only_torchserve_would_see_is_refused(archive: Path, tmp_path: Path) -> None:
    """TorchServe unpacks from the front; a member that the directory does not list is invisible to other tools."""
    hidden, extra = tmp_path / "hidden.mar", tmp_path / "extra"
    extra.write_bytes(b"import os")
    canonical.write({"zzz.py": extra}, hidden)
    good, header = archive.read_bytes(), hidden.read_bytes()[: directory_offset(hidden.read_bytes())]
    directory = directory_offset(good)
    end = bytearray(good[directory:])
    struct.pack_into("<I", end, len(end) - 6, directory + len(header))
    archive.write_bytes(good[:directory] + header + end)
    with zipfile.ZipFile(archive) as seen:
        assert "zzz.py" not in seen.namelist()
        assert seen.testzip() is None
    with pytest.raises(InvalidArchive, match="lists other members than it holds"):
        verify(archive)


def rewritten(archive: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    """An archive laid out as ours are, by somebody who knows how, without the checks of packing."""
    content = folder / "content"
    ArchiveContent(archive).extract(content)
    change(content)
    target = folder / NAME
    canonical.write(
        {path.relative_to(content).as_posix(): path for path in content.rglob("*") if path.is_file()}, target
    )
    return target


def list_in_digests(content: Path, name: str, data: bytes) -> None:
    """Write a member and its digest."""
    (content / name).write_bytes(data)
    document = json.loads((content / "digests.json").read_text())
    document["members"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (content / "digests.json").write_text(json.dumps(document))


def forget(content: Path, name: str) -> None:
    """Take a member away, and its digest with it."""
    (content / name).unlink()
    document = json.loads((content / "digests.json").read_text())
    del document["members"][name]
    (content / "digests.json").write_text(json.dumps(document))


def set_in_manifest(content: Path, key: str, value: object, of_model: bool = True) -> None:
    manifest = json.loads((content / "MAR-INF" / "MANIFEST.json").read_text())
    (manifest["model"] if of_model else manifest)[key] = value
    list_in_digests(content, "MAR-INF/MANIFEST.json", json.dumps(manifest).encode())


FORGERIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "member without digest": (
        lambda content: (content / "golden" / "extra.png").write_bytes(b"x"),
        r"holds golden/extra\.png, which digests\.json does not list",
    ),
    "digest without member": (
        lambda content: next((content / "golden").glob("*.png")).unlink(), r"lacks golden/.*which digests\.json lists",
    ),
    "missing member": (lambda content: (content / "recipe.yaml").unlink(), r"lacks recipe\.yaml"),
    "forced without a verdict": (lambda content: forget(content, "gate.json"), r"lacks gate\.json"),
    "unknown member": (lambda content: list_in_digests(content, "setup.py", b""), r"holds setup\.py, which no archive"),
    "no digests": (lambda content: (content / "digests.json").write_text("[]"), "no JSON object"),
    "nested digests": (lambda content: (content / "digests.json").write_text("[" * 100_000), "no JSON object"),
    "packages to install": (
        lambda content: set_in_manifest(content, "requirementsFile", "requirements.txt"), "and nothing else",
    ),
    "eager model": (lambda content: set_in_manifest(content, "modelFile", "model.py"), "and nothing else"),
    "name with markup": (
        lambda content: set_in_manifest(content, "modelName", "[/x]"), r"model name '\[/x\]': use letters",
    ),
    "name with a path": (lambda content: set_in_manifest(content, "modelName", "../x"), r"model name '\.\./x'"),
    "name that cannot be managed": (
        lambda content: set_in_manifest(content, "modelName", "my-token"), r"MANIFEST\.json: .*token requests",
    ),
    "version for the terminal": (
        lambda content: set_in_manifest(content, "modelVersion", "1.0\x1b[2J"), r"version '1\.0\\x1b\[2J': use numbers",
    ),
    "runtime of another kind": (
        lambda content: set_in_manifest(content, "runtime", "LSP", of_model=False),
        "must make TorchServe run python, found 'LSP'",
    ),
    "further key": (
        lambda content: set_in_manifest(content, "engine", {"x": 1}, of_model=False), "must have runtime, model and ar",
    ),
    "version of a wrong type": (lambda content: set_in_manifest(content, "modelVersion", 1), "names no model and"),
    "settings that unfold": (
        lambda content: list_in_digests(content, "model-config.yaml", b"a: &a [1]\nb: [*a, *a]\n"), r"alias \(\*a\)",
    ),
    "another handler": (lambda content: set_in_manifest(content, "handler", "other.py"), "must make TorchServe use"),
    "pickled second model": (
        lambda content: list_in_digests(content, "model.int8.onnx", pickle.dumps([])), "model.int8.onnx",
    ),
}  # fmt: skip


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forgeries_with_a_perfect_layout_are_refused(archive: Path, tmp_path: Path, forgery: str) -> None:
    """Members and digests must agree, names must be known, and the manifest may ask for nothing more."""
    change, complaint = FORGERIES[forgery]
    with pytest.raises(InvalidArchive, match=complaint):
        verify(rewritten(archive, tmp_path, change))


def test_rewriting_alone_changes_nothing(archive: Path, tmp_path: Path) -> None:
    """The control to the forgeries: the same content laid out again is the same archive."""
    assert rewritten(archive, tmp_path, lambda content: None).read_bytes() == archive.read_bytes()


class Pickled:
    """Runs a command when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.process
def test_a_pickle_in_the_place_of_the_model_is_refused_and_does_not_run(model_store: Path, tmp_path: Path) -> None:
    """Its digests agree and it would run code when loaded; neither verify nor doctor load it."""
    marker = tmp_path / "ran"
    pickled = repacked(model_store / NAME, tmp_path, lambda content: torch.save(Pickled(marker), content / "model.pt"))
    with pytest.raises(InvalidArchive, match=r"'model\.pt' is not TorchScript"):
        verify(pickled)
    assert doctor.examine(pickled).diagnosis is not None
    assert not marker.exists()
    torch.load(tmp_path / "content" / "model.pt", weights_only=False)
    assert marker.exists(), "the control: it does run code"


def test_a_signature_shows_who_built_it(archive: Path, private_key: Path, tmp_path: Path) -> None:
    """By the right key it passes; without, changed, by another key or of other bytes it does not."""
    public_key = private_key.with_name("key.pub")
    with pytest.raises(SignatureError, match=r"is not signed: .*archive sign"):
        verify(archive, public_key)
    signature = sign.write(sign.sign(archive, private_key), archive)
    assert signature == archive.with_name(f"{NAME}.sig")
    assert verify(archive, public_key).signed

    other = sign.keygen(tmp_path / "other")
    with pytest.raises(SignatureError, match="by the owner of"):
        verify(archive, other)
    good = archive.read_bytes()
    archive.write_bytes(good[:-1] + b"\1")
    with pytest.raises(SignatureError, match="no signature of"):
        verify(archive, public_key)
    archive.write_bytes(good)
    signature.write_bytes(bytes(64))
    with pytest.raises(SignatureError, match="no signature of"):
        verify(archive, public_key)


@pytest.mark.process
def test_openssl_can_check_the_signature(archive: Path, private_key: Path) -> None:
    """Nothing of ours is needed to know who signed."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl on this machine")
    signature = sign.write(sign.sign(archive, private_key), archive)
    command = [
        openssl, "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", f"{private_key}.pub", "-sigfile", signature, "-in",
    ]  # fmt: skip
    assert subprocess.run([*command, archive], capture_output=True, check=False).returncode == 0
    archive.write_bytes(archive.read_bytes() + b"x")
    assert subprocess.run([*command, archive], capture_output=True, check=False).returncode != 0


def test_keys_are_kept_and_checked(archive: Path, private_key: Path, tmp_path: Path) -> None:
    """The private key is its owner's alone and is never overwritten; what is no key is named."""
    assert stat.S_IMODE(private_key.stat().st_mode) == 0o600
    with pytest.raises(SignatureError, match="exists"):
        sign.keygen(private_key)
    nothing = tmp_path / "nothing"
    nothing.write_text("nothing")
    with pytest.raises(SignatureError, match=r"private key .*nothing"):
        sign.sign(archive, nothing)
    with pytest.raises(SignatureError, match=r"public key .*absent"):
        verify(archive, tmp_path / "absent")


def test_the_server_starts_with_no_archive_that_was_changed(archive: Path, tmp_path: Path) -> None:
    """Nothing is started, and the message names the archive and the member."""
    archive.rename(archive.with_name("another.mar"))
    with pytest.raises(ConfigError, match=rf"another\.mar is the model {MODEL}: name it {MODEL}\.mar"):
        launch.start(tmp_path, archive.parent, CONFIG, first_port=free_ports())
    archive.with_name("another.mar").rename(archive)
    append(archive, "../x", b"x")
    with pytest.raises(ConfigError, match=rf"{MODEL}\.mar: .*climbs out"):
        launch.start(tmp_path, archive.parent, CONFIG, first_port=free_ports())
    assert processes.find(tmp_path) is None


def test_with_a_public_key_the_server_takes_signed_archives_alone(
    archive: Path, private_key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unsigned it is refused; signed the start goes on, here to the next thing that is wrong."""
    monkeypatch.setenv(environment.PUBLIC_KEY_VARIABLE, f"{private_key}.pub")
    with pytest.raises(ConfigError, match="is not signed"):
        launch.start(tmp_path, archive.parent, CONFIG, first_port=free_ports())
    sign.write(sign.sign(archive, private_key), archive)
    with socket.socket() as other, pytest.raises(PortTaken):
        other.bind(("127.0.0.1", first := free_ports()))
        other.listen()
        launch.start(tmp_path, archive.parent, CONFIG, first_port=first)


@pytest.mark.process
def test_the_commands_for_keys_and_checks(archive: Path, tmp_path: Path) -> None:
    """keygen, sign and verify in a row; a refusal is one line on stderr."""
    assert run_module("archive", "keygen", tmp_path / "key").returncode == 0
    assert run_module("archive", "sign", archive, "--private-key", tmp_path / "key").returncode == 0
    finished = run_module("archive", "verify", archive, "--public-key", tmp_path / "key.pub", "--json")
    assert json.loads(finished.stdout)["signed"] is True
    assert f"{MODEL} 1.0" in run_module("archive", "verify", archive).stdout
    append(archive, "../x", b"x")
    refused = run_module("archive", "verify", archive)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith(f"error: {archive}: '../x' climbs out")
    assert len(refused.stderr.splitlines()) == 1
    absent = run_module("archive", "verify", tmp_path / "absent.mar")
    assert (absent.returncode, len(absent.stderr.splitlines())) == (1, 1)


@pytest.mark.process
def test_what_files_are_called_is_printed_as_it_is(tmp_path: Path) -> None:
    """Brackets and colons mean nothing to whoever prints them."""
    key = tmp_path / "key [copy] :key:"
    finished = run_module("archive", "keygen", key)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith(f"wrote {key}, to be kept secret")


def test_no_archive_error_escapes_the_tree() -> None:
    """What verify raises is what the commands and the server catch."""
    assert issubclass(InvalidArchive, ArchiveError)
    assert issubclass(SignatureError, ArchiveError)


def test_an_archive_that_changes_places_is_never_called_signed(
    archive: Path, private_key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another takes its place once the signature is checked: what is judged and unpacked is still what was signed.

    Negative control: the same exchange before the check is refused.
    """
    sign.write(sign.sign(archive, private_key), archive)
    public_key = private_key.with_name(f"{private_key.name}.pub")
    good = archive.read_bytes()
    other = rewritten(archive, tmp_path, lambda content: list_in_digests(content, "provenance.json", b"{}"))
    check = sign.check

    def then_exchange(*arguments: Any) -> None:
        check(*arguments)
        other.replace(archive)

    monkeypatch.setattr(sign, "check", then_exchange)
    with opened(archive, public_key) as (verified, content):
        assert verified.signed
        assert archive.read_bytes() != good
        content.extract(tmp_path / "unpacked")
    assert (tmp_path / "unpacked" / "provenance.json").read_bytes() != b"{}"
    with pytest.raises(SignatureError, match="is no signature of"):
        verify(archive, public_key)


def test_an_archive_that_is_written_to_while_it_is_read_is_refused(
    archive: Path, private_key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same file with other bytes than were signed."""
    sign.write(sign.sign(archive, private_key), archive)
    check = sign.check

    def then_write(*arguments: Any) -> None:
        check(*arguments)
        archive.write_bytes(archive.read_bytes())

    monkeypatch.setattr(sign, "check", then_write)
    with pytest.raises(InvalidArchive, match="changed while it was read"):
        verify(archive, private_key.with_name(f"{private_key.name}.pub"))


def test_a_stock_archive_is_not_called_damaged(tmp_path: Path) -> None:
    """What torch-model-archiver alone makes has no digests: the message says so and what that means."""
    stock = tmp_path / "stock.mar"
    with zipfile.ZipFile(stock, "w", zipfile.ZIP_DEFLATED) as written:
        written.writestr("MAR-INF/MANIFEST.json", json.dumps({"model": {"modelName": "x", "modelVersion": "1.0"}}))
        written.writestr("model.pt", b"x")
    with pytest.raises(InvalidArchive, match=r"was not built by `python -m archive build`: it has no digests") as found:
        verify(stock)
    assert "damaged" not in str(found.value)
