"""Promises of opening and preprocessing: what the tower reads is what transformers gives it."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.inputs import preprocessor as preprocessor_module
from mlx_vlm_prune.inputs.image import FORMATS, open_image
from mlx_vlm_prune.inputs.preprocessor import Preprocessor

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


SEE_THROUGH = {
    "palette with a transparent colour", "palette with an alpha for each colour", "RGBA", "LA",
}  # fmt: skip


def on_white() -> bool:
    transformers = pytest.importorskip("transformers")
    return tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 21)


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
        with Image.open(path) as picture:
            np.testing.assert_array_equal(got, hugging_face(picture), err_msg=path.name)


@pytest.mark.parametrize("mode", modes())
def test_every_mode_equals_clip_image_processor(mode: str) -> None:
    if mode in SEE_THROUGH and not on_white():
        pytest.skip("before 5.21 transformers shows the colour stored beneath, or warns")
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


def test_an_opaque_alpha_channel_changes_nothing_and_one_pixel_of_it_that_is_not_shows() -> None:
    colour = Image.fromarray(noise())
    opaque = colour.copy()
    opaque.putalpha(255)
    np.testing.assert_array_equal(np.asarray(open_image(encoded(opaque))), np.asarray(colour))
    opaque.putpixel((3, 5), (0, 0, 0, 0))
    opened = open_image(encoded(opaque))
    assert opened.getpixel((3, 5)) == (255, 255, 255)
    assert np.count_nonzero((np.asarray(opened) != np.asarray(colour)).any(axis=-1)) == 1


def test_a_photograph_that_pillow_decodes_at_half_its_size_is_close_to_the_exact_one(
    shared_data: Path,
) -> None:
    """The draft of the docstring: of three times the tower's sides, or none at all."""
    with Image.open(shared_data / "images" / "city-traffic.jpg") as photograph:
        enlarged = photograph.resize((2300, 1724), Image.Resampling.LANCZOS)
    data = encoded(enlarged, "JPEG", quality=90)
    drafted = Image.open(io.BytesIO(data))
    drafted.draft("RGB", (3 * 224, 3 * 224))
    assert drafted.size == (1150, 862)
    exact, near = (
        np.asarray(Preprocessor().visible(open_image(source))).astype(int)
        for source in (data, drafted)
    )
    assert np.abs(exact - near).mean() < 0.5 and np.abs(exact - near).max() <= 8


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
    monkeypatch.setattr(preprocessor_module, "MAX_PIXELS", 10**9)
    whole = np.asarray(preprocessor.visible(image)).astype(int)
    monkeypatch.setattr(preprocessor_module, "MAX_PIXELS", 0)
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
