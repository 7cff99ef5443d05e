import io
import json
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from convert.errors import UserError
from mlx_vlm_prune import image as image_module
from mlx_vlm_prune.image import FORMATS, MAX_PIXELS, Preprocessor, open_image

CLIP = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": {"shortest_edge": 224},
}


def noise(width: int = 90, height: int = 70, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def folder(path: Path, **fields: Any) -> Path:
    (path / "preprocessor_config.json").write_text(json.dumps({**CLIP, **fields}))
    return path


def hugging_face(image: Image.Image, **fields: Any) -> np.ndarray:
    """What transformers makes of a picture, channels last."""
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = module.CLIPImageProcessorPil(**fields)
    return processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises this size and holds no pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    )
    data = b"IDAT" + zlib.compress(b"")
    return start + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


def modes() -> dict[str, Image.Image]:
    colour = Image.fromarray(noise())
    palette = colour.quantize(32)
    see_through = palette.copy()
    see_through.info["transparency"] = 3
    half = palette.copy()
    half.info["transparency"] = bytes(range(0, 256, 8))
    keyed = colour.copy()
    keyed.info["transparency"] = colour.getpixel((0, 0))
    return {
        "grey": colour.convert("L"),
        "bilevel": colour.convert("1"),
        "palette": palette,
        "palette with a transparent colour": see_through,
        "palette with an alpha for each colour": half,
        "colour key": keyed,
        "RGBA": Image.fromarray(noise(channels=4), "RGBA"),
        "LA": Image.fromarray(noise(channels=2), "LA"),
    }


def test_photographs_equal_clip_image_processor_bit_for_bit(shared_data: Path) -> None:
    photographs = sorted((shared_data / "images").glob("*.jpg"))
    assert len(photographs) == 14
    for path in photographs:
        got = Preprocessor()(open_image(path))
        assert got.dtype == np.float32 and got.shape == (224, 224, 3)
        np.testing.assert_array_equal(got, hugging_face(Image.open(path)), err_msg=path.name)


@pytest.mark.parametrize("mode", modes())
def test_every_mode_equals_clip_image_processor(mode: str) -> None:
    data = encoded(modes()[mode])
    expected = hugging_face(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(Preprocessor()(open_image(data)), expected)


def test_a_cmyk_jpeg_equals_clip_image_processor() -> None:
    data = encoded(Image.fromarray(noise()).convert("CMYK"), "JPEG")
    opened = Image.open(io.BytesIO(data))
    assert opened.mode == "CMYK"
    np.testing.assert_array_equal(Preprocessor()(open_image(data)), hugging_face(opened))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_allowed_format_opens(kind: str) -> None:
    flat = Image.new("RGB", (20, 10), (10, 120, 240))
    opened = open_image(encoded(flat, kind))
    assert (opened.mode, opened.size) == ("RGB", (20, 10))
    np.testing.assert_allclose(np.asarray(opened), np.asarray(flat), atol=4)


def test_sixteen_bit_grey_is_scaled_to_eight_bits_rather_than_clipped() -> None:
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16) + 37
    opened = open_image(encoded(Image.fromarray(ramp)))
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(np.asarray(opened), np.repeat(grey[..., None], 3, axis=2))
    expected = hugging_face(Image.fromarray(grey))
    np.testing.assert_array_equal(Preprocessor()(opened), expected)


def test_32_bit_grey_is_scaled_like_16_bit_and_floats_are_refused() -> None:
    wide = Image.fromarray(np.array([[0, 256, 65535, 70000]], dtype=np.int32))
    assert wide.mode == "I"
    assert np.asarray(open_image(wide))[0, :, 0].tolist() == [0, 1, 255, 255]
    with pytest.raises(UserError, match="floating-point"):
        open_image(Image.new("F", (4, 4)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_exif_rotated_image_equals_the_one_turned_by_hand(orientation: int) -> None:
    turns = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_270],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_90],
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(noise())
    upright = stored
    for turn in turns.get(orientation, []):
        upright = upright.transpose(turn)
    opened = open_image(encoded(stored, exif=exif))
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(upright))
    np.testing.assert_array_equal(Preprocessor()(opened), hugging_face(upright))


def test_transparent_pixels_show_white_whatever_colour_is_stored_beneath() -> None:
    assert open_image(Image.new("RGBA", (2, 2), (200, 10, 10, 0))).getpixel((0, 0)) == (255,) * 3
    assert open_image(Image.new("RGBA", (2, 2), (200, 10, 10, 255))).getpixel((0, 0)) == (
        200,
        10,
        10,
    )


def test_only_the_first_frame_of_an_animation_is_read() -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(red, kind, save_all=True, append_images=[blue], **options)
        assert open_image(data).getpixel((4, 4)) == (255, 0, 0), kind


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 450), (640, 201), (223, 225)])
def test_slivers_and_odd_sizes_equal_clip_image_processor(size: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*size))
    np.testing.assert_array_equal(Preprocessor()(open_image(image)), hugging_face(image))


@pytest.mark.parametrize("size", [(3, 1400), (1400, 3), (37, 1701)])
def test_a_sliver_resized_only_where_seen_differs_by_one_grey_level_at_most(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, preprocessor = Image.fromarray(noise(*size)), Preprocessor()
    monkeypatch.setattr(image_module, "MAX_PIXELS", 10**9)
    whole = np.asarray(preprocessor.visible(image)).astype(int)
    monkeypatch.setattr(image_module, "MAX_PIXELS", 0)
    seen = np.asarray(preprocessor.visible(image)).astype(int)
    assert np.abs(whole - seen).max() <= 1


def test_an_endless_sliver_is_resized_in_little_memory_and_refused_without_a_crop() -> None:
    sliver = Image.new("RGB", (1, 1_000_000), (9, 8, 7))
    seen = Preprocessor().visible(sliver)  # the whole would be 150 GB
    assert seen.size == (224, 224) and seen.getpixel((100, 100)) == (9, 8, 7)
    with pytest.raises(UserError, match="crop it first"):
        Preprocessor(crop=None)(sliver)


@pytest.mark.parametrize(
    "fields",
    [
        {"size": 64, "crop_size": 96},  # padded with black on all sides
        {"size": 65, "crop_size": 96},  # one line more above than below
        {"size": {"height": 60, "width": 100}, "crop_size": {"height": 80, "width": 50}},
        {"size": {"shortest_edge": 50}, "crop_size": {"height": 33, "width": 41}},
        {"resample": 2},
        {"do_resize": False},
        {"do_center_crop": False},
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 0.5, 0.0], "image_std": [0.5, 1.0, 2.0]},
    ],
    ids=str,
)
def test_every_setting_equals_clip_image_processor(tmp_path: Path, fields: dict[str, Any]) -> None:
    image = Image.fromarray(noise(120, 77))
    got = Preprocessor.from_folder(folder(tmp_path, **fields))(open_image(image))
    np.testing.assert_array_equal(got, hugging_face(image, **{**CLIP, **fields}))
    assert got.dtype == np.float32


def test_the_defaults_are_those_of_clip(tmp_path: Path) -> None:
    assert Preprocessor.from_folder(folder(tmp_path)) == Preprocessor()
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert Preprocessor.from_folder(tmp_path) == Preprocessor()


def test_visible_is_the_picture_the_tower_sees() -> None:
    image, preprocessor = Image.fromarray(noise(300, 200)), Preprocessor()
    seen = preprocessor.visible(image)
    assert (seen.mode, seen.size) == ("RGB", (224, 224))
    plain = Preprocessor(mean=None, rescale=None)(image)
    np.testing.assert_array_equal(np.asarray(seen), plain)
    by_hand = ImageOps.fit(image.resize((336, 224), Image.Resampling.BICUBIC), (224, 224))
    np.testing.assert_array_equal(np.asarray(seen), np.asarray(by_hand))


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


@pytest.mark.parametrize(("field", "value"), ABSURD)
def test_an_absurd_setting_is_refused_by_name(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(UserError) as caught:
        Preprocessor.from_folder(folder(tmp_path, **{field: value}))
    assert f"preprocessor_config.json: {field} is" in str(caught.value)
    assert "must be" in str(caught.value)


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
    with pytest.raises(UserError, match=r"notes\.png is not a PNG, JPEG, WEBP, GIF or BMP image"):
        open_image(tmp_path / "notes.png")


@pytest.mark.parametrize("kind", ["TIFF", "ICO", "EPS", "PPM"])
def test_other_formats_are_never_tried(kind: str) -> None:
    with pytest.raises(UserError, match="is not a PNG"):
        open_image(encoded(Image.fromarray(noise()), kind))


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


def test_pillows_warnings_are_errors_here_and_untouched_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def suspicious(image: Image.Image) -> Image.Image:
        warnings.warn("Corrupt EXIF data", UserWarning, stacklevel=1)
        return image

    monkeypatch.setattr(ImageOps, "exif_transpose", suspicious)
    with pytest.raises(UserError, match="Corrupt EXIF data"):
        open_image(encoded(Image.fromarray(noise())))
    with pytest.warns(UserWarning):
        suspicious(Image.new("RGB", (1, 1)))


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
