"""Promises about photographs of 48 megapixels, HEIC and TIFF: they are read, in little memory."""

import io
import json
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_prune import Chat, batch_generate, generate, load
from mlx_vlm_prune.chat import main as chat_main
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.evaluate import main as evaluate_main
from mlx_vlm_prune.generate import main
from mlx_vlm_prune.inputs.image import MOST_PIXELS, is_heic, open_image
from mlx_vlm_prune.inputs.placement import stored_image

from . import host_folders
from .test_generate import refused
from .test_image import encoded, noise
from .test_image_refusals import png_header

ROOT = Path(__file__).resolve().parents[1]
PHONE = (8064, 6048)  # an iPhone's 48 megapixels
QUESTION = "Is there a red star?"
LIMIT = "more than the 25 megapixels allowed"


@pytest.fixture(scope="module")
def phone(tmp_path_factory) -> Path:
    """A photograph of a phone: left half red, right half blue."""
    path = tmp_path_factory.mktemp("phone") / "IMG_0001.JPG"
    small = Image.fromarray(np.array([[[250, 10, 10], [10, 10, 250]]], np.uint8))
    small.resize(PHONE, Image.Resampling.NEAREST).save(path, quality=80)
    return path


@pytest.fixture(scope="module")
def scenes():
    return load()


def test_a_jpeg_of_48_megapixels_is_opened_at_half_its_size(phone):
    opened = open_image(phone)
    assert opened.size == (PHONE[0] // 2, PHONE[1] // 2)
    assert np.abs(np.asarray(opened)[1000, 1000].astype(int) - (250, 10, 10)).max() < 9
    assert np.abs(np.asarray(opened)[1000, 3000].astype(int) - (10, 10, 250)).max() < 9
    assert open_image(phone, max_pixels=50_000_000).size == PHONE
    assert open_image(phone, max_pixels=PHONE[0] * PHONE[1] // 64).size == (1008, 756)
    with pytest.raises(UserError, match=r"more than the 0\.5 megapixels allowed"):
        open_image(phone, max_pixels=500_000)


def test_every_way_in_takes_a_photograph_of_48_megapixels(scenes, phone, tmp_path, capsys):
    expected = generate(*scenes, QUESTION, phone, max_tokens=2)
    assert expected.images[0]["size"] == [*PHONE]
    chat = Chat(*scenes, max_tokens=2)
    for answer in (
        chat.ask(QUESTION, phone.read_bytes()),
        *batch_generate(*scenes, [QUESTION], [phone], max_tokens=2),
    ):
        assert (answer.token_ids, answer.images) == (expected.token_ids, expected.images)
    main(["--image", str(phone), "--prompt", QUESTION, "--json", str(tmp_path / "a.json")])
    assert json.loads((tmp_path / "a.json").read_text())["images"] == expected.images
    questions = tmp_path / "questions.jsonl"
    line = {"image": str(phone), "question": QUESTION, "answer": "no"}
    questions.write_text(json.dumps(line))
    evaluate_main(["--questions", str(questions), "--pruner", "norm", "--keep-ratio", "0.5",
                   "--out", str(tmp_path / "e.json")])  # fmt: skip
    assert "100.0" in capsys.readouterr().out
    capsys.readouterr()


def test_a_chat_by_lines_takes_it(phone, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/image {phone}\n{QUESTION}\n"))
    chat_main(["--image", str(phone), "--max-tokens", "2"])
    shown = capsys.readouterr()
    assert "error" not in shown.err and "The next question is about" in shown.out


def test_max_pixels_sets_the_limit(scenes, tmp_path, capsys):
    file = tmp_path / "a.png"
    file.write_bytes(encoded(Image.fromarray(noise(100, 90))))
    assert generate(*scenes, QUESTION, file, max_pixels=9000, max_tokens=1).images
    for ask in (
        lambda: generate(*scenes, QUESTION, file, max_pixels=8999, max_tokens=1),
        lambda: batch_generate(*scenes, [QUESTION], [file], max_pixels=8999, max_tokens=1),
        lambda: Chat(*scenes, max_pixels=8999).ask(QUESTION, file),
    ):
        with pytest.raises(UserError, match=r"more than the 0\.008999 megapixels allowed"):
            ask()
    argv = ["--image", str(file), "--prompt", QUESTION, "--max-pixels"]
    assert "allowed; --max-pixels allows more" in refused(capsys, [*argv, "8999"])
    assert f"--max-pixels is 0; it must be a whole number from 1 to {MOST_PIXELS}" in refused(
        capsys, [*argv, "0"]
    )
    for value in (-1, MOST_PIXELS + 1, True, 2.5, "9"):
        with pytest.raises(UserError, match="max_pixels is "):
            generate(*scenes, QUESTION, file, max_pixels=value)


def test_a_large_png_is_refused_with_the_option_that_takes_it(tmp_path):
    with pytest.raises(UserError, match=f"{LIMIT}; max_pixels allows more"):
        open_image(png_header(*PHONE))
    with pytest.raises(UserError, match="truncated"):  # past the limit, there are no pixels
        open_image(png_header(*PHONE), max_pixels=50_000_000)


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_resize_shape_lifts_the_limit(tmp_path, monkeypatch):
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
    home = host_folders.desk(tmp_path, ["qwen2_5_vl"])
    model = load(home / "qwen2_5_vl")
    monkeypatch.setattr("mlx_vlm_prune.generation.request.MAX_PIXELS", 80 * 90 - 1)
    with pytest.raises(UserError, match="megapixels allowed"):
        generate(*model, "w7", home / "a.png", max_tokens=1)
    options = {"host_options": {"resize_shape": [56, 56]}, "max_tokens": 1}
    assert generate(*model, "w7", home / "a.png", **options).images[0]["size"] == [90, 80]
    assert Chat(*model, **options).ask("w7", home / "a.png").images[0]["seen"] == [56, 56]


def test_a_progressive_jpeg_is_held_whole_so_it_may_be_twice_as_large(tmp_path):
    data = encoded(Image.fromarray(noise(100, 90)), "JPEG", progressive=True)
    assert open_image(data, max_pixels=4500).size == (50, 45)
    with pytest.raises(UserError, match="is a progressive JPEG, of which all is held"):
        open_image(data, max_pixels=4499)


def test_a_jpeg_thinner_than_a_scale_is_scaled_or_refused():
    data = encoded(Image.fromarray(noise(1000, 3)), "JPEG")
    assert open_image(data, max_pixels=3000).size == (1000, 3)
    assert open_image(data, max_pixels=1000).size == (500, 2)
    for most in (1, 130, 999):
        with pytest.raises(UserError, match=r"more than the \S+ megapixels allowed"):
            open_image(data, max_pixels=most)


def test_an_image_file_of_more_bytes_than_its_pixels_may_take_is_not_read(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(UserError, match="has 1073741824 bytes; of an image at most 216777216"):
        open_image(tmp_path / "a.png")


TIFFS = {
    "RGB": Image.fromarray(noise()), "grey": Image.fromarray(noise()).convert("L"),
    "palette": Image.fromarray(noise()).quantize(32),
    "bilevel": Image.fromarray(noise()).convert("1"),
    "RGBA": Image.fromarray(np.dstack([noise(), np.full((70, 90), 255, np.uint8)])),
}  # fmt: skip


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("mode", TIFFS)
def test_a_tiff_is_read_as_pillow_reads_it(mode, compression):
    opened = open_image(encoded(TIFFS[mode], "TIFF", compression=compression))
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(TIFFS[mode].convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_tiff_is_turned_once(orientation, compression):
    stored = Image.fromarray(noise())
    options = {"tiffinfo": {0x0112: orientation}, "compression": compression}
    upright = open_image(encoded(stored, "PNG", exif=_exif(orientation)))
    opened = open_image(encoded(stored, "TIFF", **options))
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(upright))
    assert opened.info == upright.info


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_of_a_tiff_with_pages_the_first_is_read_and_16_bits_are_scaled():
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    pages = encoded(red, "TIFF", save_all=True, append_images=[blue] * 3)
    assert open_image(pages).getpixel((4, 4)) == (255, 0, 0)
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16) + 37
    got = np.asarray(open_image(encoded(Image.fromarray(ramp), "TIFF")))
    np.testing.assert_array_equal(got[..., 0], np.arange(256).reshape(16, 16))


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)


class StandIn:
    """What pillow-heif's open_heif returns: the size is known before a pixel is decoded."""

    def __init__(self, file, size=(90, 70)):
        self.data, self.size = file.read(), size

    def to_pillow(self):
        return Image.fromarray(noise())


def test_heic_is_read_where_pillow_heif_is_installed(monkeypatch, tmp_path, scenes):
    module = types.ModuleType("pillow_heif")
    module.open_heif = StandIn
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    (tmp_path / "IMG_0002.HEIC").write_bytes(HEIC)
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "IMG_0002.HEIC")), noise())
    answer = generate(*scenes, QUESTION, tmp_path / "IMG_0002.HEIC", max_tokens=1)
    assert answer.images[0]["size"] == [90, 70]
    module.open_heif = lambda file: StandIn(file, (9000, 9000))
    with pytest.raises(UserError, match=r"all is held: it has more than the 50 megapixels allowed"):
        open_image(HEIC)


def test_a_heic_that_is_too_large_to_keep_is_opened_at_half_its_size(monkeypatch):
    """A phone's 48 megapixels; here 90 x 70 are too many."""
    module = types.ModuleType("pillow_heif")
    module.open_heif = StandIn
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    opened = open_image(HEIC, max_pixels=90 * 70 - 1)
    np.testing.assert_array_equal(
        np.asarray(opened), np.asarray(Image.fromarray(noise()).reduce(2))
    )
    assert stored_image(opened).size == (90, 70)
    assert open_image(HEIC, max_pixels=90 * 70 // 2).size == (45, 35)
    with pytest.raises(UserError, match="is a HEIC file, of which all is held"):
        open_image(HEIC, max_pixels=90 * 70 // 2 - 1)


BRANDS = {
    "an image": (b"mif1", b"mif1heic", True), "a sequence": (b"msf1", b"hevcmif1msf1", True),
    "an iPhone's": (b"heic", b"mif1MiHEheic", True), "alone": (b"heix", b"", True),
    "AVIF": (b"avif", b"mif1miaf", False), "MP4": (b"isom", b"mp41", False),
}  # fmt: skip


@pytest.mark.parametrize("kind", BRANDS)
def test_heic_is_told_by_any_of_its_brands(kind):
    major, others, expected = BRANDS[kind]
    size = struct.pack(">L", 16 + len(others))
    box = size + b"ftyp" + major + bytes(4) + others
    assert is_heic(box + b"heic" * 9) is expected


def test_heic_without_pillow_heif_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "IMG_0002.HEIC").write_bytes(HEIC)
    with pytest.raises(UserError, match=r"needs pillow_heif, which is not installed: pip install"):
        open_image(tmp_path / "IMG_0002.HEIC")


def test_a_file_that_pillow_heif_wrote_is_read():
    pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    data = io.BytesIO()
    colours = Image.new("RGB", (64, 48), "red")
    pillow_heif.from_pillow(colours).save(data, quality=95)
    opened = open_image(data.getvalue())
    assert opened.size == (64, 48)
    assert np.abs(np.asarray(opened).astype(int) - (255, 0, 0)).max() < 9
    with pytest.raises(UserError, match="truncated or damaged"):
        open_image(data.getvalue()[:300])


def test_tiff_readers_are_imported_for_tiffs_only(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(Image.new("RGB", (4, 4))))
    program = (
        "import sys; from mlx_vlm_prune.inputs.image import open_image; open_image(sys.argv[1]);"
        " print('PIL.TiffImagePlugin' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "a.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


DAMAGED = """
import sys
from PIL import Image
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.inputs.image import open_image
try:
    open_image(sys.argv[1])
except UserError as e:
    print(e)
sys.stderr.flush()
print("behind", file=sys.stderr, flush=True)
try:
    Image.open(sys.argv[1]).load()
except OSError:
    pass
"""


def test_libtiff_prints_nothing_of_a_damaged_file_and_elsewhere_what_it_did(tmp_path):
    data = bytearray(encoded(Image.fromarray(noise()), "TIFF", compression="tiff_adobe_deflate"))
    data[8:200] = bytes(192)
    (tmp_path / "a.tif").write_bytes(data)
    command = [sys.executable, "-c", DAMAGED, str(tmp_path / "a.tif")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "a.tif is truncated or damaged" in done.stdout and done.stdout.count("\n") == 1
    of_ours, of_pillow = done.stderr.split("behind\n")
    assert (of_ours, "Decod" in of_pillow) == ("", True)
