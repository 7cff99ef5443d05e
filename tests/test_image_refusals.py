"""Promises about images and settings that cannot be: one sentence, and little memory."""

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.inputs.image import FORMATS, MAX_PIXELS, open_image
from mlx_vlm_prune.inputs.preprocessor import Preprocessor

from .test_image import encoded, folder, noise

ROOT = Path(__file__).resolve().parents[1]


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises this size and holds no pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    )
    data = b"IDAT" + zlib.compress(b"")
    return start + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


ABSURD = [
    ("size", 0),
    ("size", 10**9),
    ("size", True),
    ("size", "224"),
    ("size", {"longest_edge": 224}),
    ("size", {"height": 224}),
    ("crop_size", -1),
    ("crop_size", {"height": 224, "width": 1.5}),
    ("do_resize", "yes"),
    ("do_normalize", 1),
    ("rescale_factor", 0),
    ("rescale_factor", float("nan")),
    ("rescale_factor", [1]),
    ("image_mean", 0.5),
    ("image_mean", [0.5, 0.5]),
    ("image_mean", [0.5, 0.5, float("inf")]),
    ("image_std", [0.5, 0.0, 0.5]),
    ("image_std", [0.5, -0.5, 0.5]),
    ("image_std", None),
    ("resample", 7),
    ("resample", True),
    ("resample", [3]),
]

ALLOWED = {
    "size": 'an integer, {"shortest_edge": n} or ',
    "crop_size": 'an integer or {"height": n, "width": n}, n from 1 to 4096',
    "do_resize": "true or false",
    "do_normalize": "true or false",
    "rescale_factor": "a positive number",
    "image_mean": "three finite numbers",
    "image_std": "three positive numbers",
    "resample": "2 (bilinear) or 3 (bicubic)",
}


@pytest.mark.parametrize(("field", "value"), ABSURD)
def test_an_absurd_setting_is_refused_by_name(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(UserError) as caught:
        Preprocessor.from_folder(folder(tmp_path, **{field: value}))
    assert f"preprocessor_config.json: {field} is" in str(caught.value)
    assert f", not {ALLOWED[field]}" in str(caught.value)


@pytest.mark.parametrize("text", [None, "", "[1]", "{", "\ufeff{}", "[" * 100_000])
def test_an_unreadable_preprocessor_config_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "preprocessor_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        Preprocessor.from_folder(tmp_path)


def test_a_missing_file_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no image file .*nowhere\.png"):
        open_image(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match="there is no image file"):
        open_image("a\0b")


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a directory"):
        open_image(str(tmp_path))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    with pytest.raises(UserError, match=r"empty\.png is empty"):
        open_image(tmp_path / "empty.png")
    with pytest.raises(UserError, match="the image is empty"):
        open_image(b"")


def test_a_file_that_is_not_an_image_is_refused_and_told_what_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not a picture")
    with pytest.raises(
        UserError, match=r"notes\.png is not a PNG, JPEG, WEBP, GIF, BMP or TIFF image"
    ):
        open_image(tmp_path / "notes.png")


@pytest.mark.parametrize("kind", ["ICO", "EPS", "PPM"])
def test_other_formats_are_never_tried(kind: str) -> None:
    with pytest.raises(UserError, match="is not a PNG"):
        open_image(encoded(Image.fromarray(noise()), kind))


def test_opening_imports_none_of_pillows_other_readers(tmp_path: Path) -> None:
    """Where WEBP's is missing, Pillow imports all that it has: tens of milliseconds, once."""
    (tmp_path / "flat.gif").write_bytes(encoded(Image.new("RGB", (4, 4)), "GIF"))
    program = (
        "import sys; from mlx_vlm_prune.inputs.image import open_image; open_image(sys.argv[1]);"
        " print(*(m for m in ('Psd', 'Icns', 'Pdf') if f'PIL.{m}ImagePlugin' in sys.modules))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "flat.gif")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_a_truncated_image_is_refused_in_one_sentence(
    tmp_path: Path, kind: str, share: float
) -> None:
    data = encoded(Image.fromarray(noise()), kind)
    path = tmp_path / "half.img"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=r"half\.img is truncated or damaged") as caught:
        open_image(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_bytes_give_a_picture_or_a_user_error_and_nothing_else(kind: str) -> None:
    rng = np.random.default_rng(3)
    good = np.frombuffer(encoded(Image.fromarray(noise(40, 30)), kind), np.uint8)
    for _ in range(150):
        data = good.copy()
        where = rng.integers(0, min(len(data), 400), rng.integers(1, 6))
        data[where] = rng.integers(0, 256, len(where))
        try:
            assert open_image(data.tobytes()).mode == "RGB"
        except UserError as problem:
            assert "\n" not in str(problem)


@pytest.mark.parametrize("size", [(20_000, 20_000), (12_000, 12_000), (5001, 5000), (1, 2**31 - 1)])
def test_too_many_pixels_are_refused_from_the_header(
    tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_decoding(*_: object) -> None:
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", no_decoding)
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(*size))
    with pytest.raises(UserError, match=r"bomb\.png has more than the 25 megapixels allowed"):
        open_image(path)


def test_the_pixel_limit_itself_is_allowed_and_one_row_more_is_not() -> None:
    assert MAX_PIXELS == 25_000_000
    with pytest.raises(UserError, match="truncated"):  # past the size check, there are no pixels
        open_image(png_header(5000, 5000))
    with pytest.raises(UserError, match="megapixels"):
        open_image(Image.new("1", (5000, 5001)))


def test_paths_strings_bytes_and_images_all_open_alike(tmp_path: Path) -> None:
    picture = Image.fromarray(noise())
    path = tmp_path / "日本 🎈.png"
    path.write_bytes(encoded(picture))
    for source in (path, str(path), path.read_bytes(), picture):
        np.testing.assert_array_equal(np.asarray(open_image(source)), np.asarray(picture))


def test_the_opened_image_is_a_copy() -> None:
    picture = Image.fromarray(noise())
    open_image(picture).paste((0, 0, 0), (0, 0, 90, 70))
    assert np.asarray(picture).any()
