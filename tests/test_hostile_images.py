"""Whatever a client sends, in whatever batch: a 4xx for that request, at a small cost, and nothing for anybody else."""

from __future__ import annotations

import contextlib
import json
import random
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from client.torchserve import TorchServe
from handler.decoding import decode
from handler.errors import RequestError
from handler.formats import FORMATS
from handler.image_classifier import ImageClassifier
from handler.settings import HandlerSettings
from server.launch import RunningServer
from tests.conftest import MODEL, ROOT
from tests.images import BAD, GOOD, encode, gradient, png_header
from tests.worker import ask, load

SMALL = HandlerSettings(channels=3, resize_size=32, crop_size=32)


def gif(screen: tuple[int, int], frame: tuple[int, int]) -> bytes:
    header = b"GIF89a" + struct.pack("<HH", *screen) + b"\xf0\0\0" + b"\0\0\0\xff\xff\xff"
    return header + b"," + struct.pack("<HHHH", 0, 0, *frame) + b"\0\x02\x02L\x01\0;"


def webp(width: int, height: int) -> bytes:
    bits = b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + bytes(21)
    chunk = b"VP8L" + struct.pack("<I", len(bits)) + bits
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def bmp(width: int, height: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header


def tiff(width: int, height: int) -> bytes:
    entries = ((256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, 99))
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + tags + bytes(200)


def jpeg(width: int, height: int) -> bytes:
    data = bytearray(encode(gradient(), "JPEG"))
    frame = data.index(b"\xff\xc0") + 5
    data[frame : frame + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def jpeg_of_many_scans() -> bytes:
    """A progressive JPEG whose last scan comes a thousand times."""
    data = encode(gradient(2000, 1500), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 1000 + data[-2:]


def jpeg_of_many_plain_scans() -> bytes:
    """A baseline JPEG that promises three components and brings the first of them a thousand times."""
    data = encode(gradient(400, 300).convert("L"), "JPEG")
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    components = bytes([3, 1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0])
    header = data[:frame] + b"\xff\xc0\0\x11" + data[frame + 4 : frame + 9] + components + data[frame + 13 : scan]
    return header + data[scan:-2] * 1000 + data[-2:]


BOMBS = {
    "png that promises": (png_header(20_000, 20_000), 413),
    "png of 0.2 MB": (
        png_header(13_300, 13_300, zlib.compress(bytes(13_301) * 13_300, 9)), 413,
    ),
    "png of one row": (png_header(20_000, 1, zlib.compress(bytes(20_001))), 413),
    "gif with a large screen": (gif((65_535, 65_535), (10, 10)), 413),
    "gif with a large frame": (gif((10, 10), (65_535, 65_535)), 413),
    "webp": (webp(16_383, 16_383), 413),
    "bmp": (bmp(60_000, 60_000), 413),
    "tiff": (tiff(60_000, 60_000), 413),
    "jpeg": (jpeg(65_500, 65_500), 413),
    "jpeg of many scans": (jpeg_of_many_scans(), 400),
    "jpeg of many plain scans": (jpeg_of_many_plain_scans(), 400),
}  # fmt: skip

MEASURE = """
import json, sys, time
from pathlib import Path
from handler.decoding import decode
from handler.errors import RequestError
from handler.formats import FORMATS
from handler.settings import HandlerSettings

def memory_mb(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

settings = HandlerSettings(channels=3, resize_size=256, crop_size=224)
costs = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    data, code = path.read_bytes(), 200
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, started = memory_mb("VmRSS"), time.process_time()
    try:
        decode(data, settings)
    except RequestError as refusal:
        code = refusal.code
    seconds = time.process_time() - started
    costs[path.name] = (code, memory_mb("VmHWM") - before, seconds)
print(json.dumps(costs))
"""


def measure(folder: Path) -> dict[str, tuple[int, float, float]]:
    """For each file: its status, by how many MB the process grew, and seconds of CPU, in a fresh process."""
    command = [sys.executable, "-c", MEASURE, str(folder)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    costs: dict[str, tuple[int, float, float]] = json.loads(finished.stdout)
    return costs


@pytest.mark.process
def test_bombs_are_refused_from_their_header(tmp_path: Path) -> None:
    """A refused bomb costs less than 50 MB and less time than an honest photograph of 12 megapixels."""
    (tmp_path / "0 honest").write_bytes(encode(gradient(4000, 3000), compress_level=1))
    for name, (body, _) in BOMBS.items():
        (tmp_path / name).write_bytes(body)
    costs = measure(tmp_path)
    honest_code, _, honest_s = costs.pop("0 honest")
    assert honest_code == 200
    for name, (code, megabytes, seconds) in costs.items():
        assert code == BOMBS[name][1], name
        assert megabytes < 50, name
        assert seconds < honest_s, name


@pytest.mark.process
def test_the_cost_of_a_large_image_shows(tmp_path: Path) -> None:
    """The control of the measurement: 24 megapixels, which are allowed, do cost more than 50 MB."""
    (tmp_path / "large").write_bytes(png_header(4900, 4900, zlib.compress(bytes(4901) * 4900, 1)))
    [(code, megabytes, _)] = measure(tmp_path).values()
    assert code == 200
    assert megabytes > 50


@pytest.mark.parametrize("image_format", [name for name in ("GIF", "PNG", "WEBP", "TIFF", "AVIF") if name in FORMATS])
def test_animations_are_their_first_frame(image_format: str) -> None:
    """However many frames follow, the first one is what is classified."""
    frames = [Image.new("RGB", (64, 48), (255, 0, 0)), *(Image.new("RGB", (64, 48), (0, i, 255)) for i in range(99))]
    animated = encode(frames[0], image_format, save_all=True, append_images=frames[1:])
    red, green, blue = decode(animated, SMALL).float().mean((1, 2))
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # a line in the worker's log
def test_damaged_metadata_does_not_refuse_a_good_image() -> None:
    """EXIF that cannot be read leaves the picture as it is."""
    good = encode(gradient(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + bytes(20))
    assert (decode(good, SMALL).float() - decode(encode(gradient(), "JPEG"), SMALL).float()).abs().max() == 0


@pytest.mark.parametrize("background", ["white", "black", "#ff0000"])
def test_alpha_is_laid_over_the_background_of_the_settings(background: str) -> None:
    """What shows through a transparent picture can be chosen."""
    chosen = SMALL.model_copy(update={"background": background})
    expected = Image.new("RGB", (1, 1), background).getpixel((0, 0))
    decoded = decode(encode(Image.new("RGBA", (32, 32), (9, 9, 9, 0))), chosen)
    assert tuple(decoded[:, 16, 16].tolist()) == expected


def mutate(seed: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """Replace `length` bytes at each position, taken modulo the length of the image, by others."""
    data = bytearray(seed)
    for position, length, replacement in edits:
        start = position % (len(data) + 1)
        data[start : start + length] = replacement
    return bytes(data)


EDITS = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 64), st.binary(max_size=8)), min_size=1, max_size=4)


def answered_or_refused(seed: bytes, edits: list[tuple[int, int, bytes]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in a worker, where Pillow's warnings are lines in the log
        try:
            assert decode(mutate(seed, edits), SMALL).shape == (3, 32, 32)
        except RequestError as refusal:
            assert 400 <= refusal.code < 500
            assert str(refusal)


def damaged(count: int) -> Callable[[], None]:
    """That for so many images, the same ones each time."""
    given_images = given(seed=st.sampled_from(GOOD), edits=EDITS)(answered_or_refused)
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))(
        given_images
    )


def test_mutated_images_are_answered_or_refused() -> None:
    """Damaged images: the model's input or a refusal of the tree, never another error."""
    damaged(200)()


@pytest.mark.slow
def test_ten_thousand_mutated_images_are_answered_or_refused() -> None:
    """The same for 10,000."""
    damaged(10_000)()


def random_mutation(draw: random.Random) -> bytes:
    edits = [(draw.randrange(1 << 16), draw.randrange(64), draw.randbytes(draw.randrange(9))) for _ in range(3)]
    return mutate(draw.choice(GOOD), edits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # as above
def test_memory_stays_flat_over_damaged_images() -> None:
    """The second five thousand damaged images leave no more than 10 MB behind."""
    draw, process, memory = random.Random(0), psutil.Process(), []
    for _ in range(2):
        for _ in range(5000):
            with contextlib.suppress(RequestError):
                decode(random_mutation(draw), SMALL)
        memory.append(process.memory_info().rss)
    assert memory[1] - memory[0] < 10 << 20


@pytest.mark.slow
def test_a_thousand_batches_with_one_bad_request(run: Path) -> None:
    """Seven good requests and a bad one of any kind anywhere: the seven are answered exactly as without it."""
    classifier: ImageClassifier = load(run)
    draw = random.Random(0)
    images = [path.read_bytes() for path in sorted((run / "golden").glob("*.png"))]
    bad = list((BAD | BOMBS).values())
    refused = 0
    for _ in range(1000):
        batch = draw.sample(images, 7)
        expected, _ = ask(classifier, run, batch)
        position, (body, code) = draw.randrange(8), draw.choice(bad)
        batch.insert(position, body)
        answers, statuses = ask(classifier, run, batch)
        assert statuses.pop(position) == code
        assert answers.pop(position)["code"] == code
        assert statuses == [200] * 7
        assert answers == expected
        refused += 1
    assert refused == 1000


def worker_pids(client: TorchServe) -> list[int]:
    return [worker["pid"] for worker in client.describe(MODEL)["workers"]]


@pytest.mark.slow
def test_a_thousand_bad_requests_among_seven_thousand_good(
    torchserve: RunningServer, client: TorchServe, session: requests.Session, run: Path
) -> None:
    """Live, where batches form by chance: exactly the bad ones are refused, the others answered to 1e-5."""
    images = [path.read_bytes() for path in sorted((run / "golden").glob("*.png"))]
    expected = {image: client.predict(MODEL, image) for image in images}
    draw = random.Random(1)
    bad = list((BAD | BOMBS).values())
    bodies: list[tuple[bytes, int]] = []
    for _ in range(1000):
        eight = [*((image, 200) for image in draw.choices(images, k=7)), draw.choice(bad)]
        bodies += draw.sample(eight, 8)
    url = f"{torchserve.inference_url}/predictions/{MODEL}"

    def ask_for(request: tuple[bytes, int]) -> int:
        body, code = request
        answer = session.post(url, data=body, timeout=60)
        assert answer.status_code == code
        if code == 200:
            assert answer.json() == pytest.approx(expected[body], abs=1e-5)
        return code

    pids = worker_pids(client)
    with ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(ask_for, bodies))
    assert (statuses.count(200), len(statuses)) == (7000, 8000)
    assert worker_pids(client) == pids, "no worker died"


def test_two_thousand_mutated_images_over_http(
    torchserve: RunningServer, client: TorchServe, session: requests.Session
) -> None:
    """No 5xx, no worker death, and the worker's memory stays flat."""
    draw = random.Random(2)
    content_types = ["application/octet-stream", "image/jpeg", "image/png", "text/plain", "application/json"]
    url = f"{torchserve.inference_url}/predictions/{MODEL}"

    def ask_for(body: bytes) -> int:
        content_type = {"Content-Type": draw.choice(content_types)}
        return session.post(url, data=body, headers=content_type, timeout=60).status_code

    [pid] = worker_pids(client)
    worker = psutil.Process(pid)
    bodies = [random_mutation(draw) for _ in range(2000)]
    memory = []
    with ThreadPoolExecutor(16) as pool:
        for start in range(0, 2000, 500):
            assert set(pool.map(ask_for, bodies[start : start + 500])) <= {200, 400, 413, 415}
            memory.append(worker.memory_info().rss)
    assert worker_pids(client) == [pid]
    assert memory[-1] - memory[0] < 30 << 20
