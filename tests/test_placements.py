"""Promises about boxes in answers: where what a model saw lies in the stored image.

Shapes: H height, W width of a picture.
"""

import io
import itertools
import json
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_vlm_prune import Chat, batch_generate, generate, load
from mlx_vlm_prune.generate import main
from mlx_vlm_prune.hosts.families import host_of
from mlx_vlm_prune.hosts.prompt import prepare_prompt
from mlx_vlm_prune.hosts.views import View
from mlx_vlm_prune.inputs.image import open_image
from mlx_vlm_prune.inputs.placement import placement
from mlx_vlm_prune.inputs.preprocessor import Preprocessor

from . import host_folders
from .test_image import encoded

KINDS = {
    "crop": Preprocessor(size=100, crop=(100, 100)),
    "crop wider": Preprocessor(size=50, crop=(100, 100)),
    "square": Preprocessor(size=(100, 100), crop=None),
    "padded": Preprocessor(size=100, crop=(100, 100), pad=True),
    "shortest side": Preprocessor(size=100, crop=None),
    "as it is": Preprocessor(size=None, crop=None),
    "cut": Preprocessor(size=None, crop=(60, 80)),
}


def stored_with(image: Image.Image, orientation: int, kind: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif)


# Of an image that is 400 x 200 when it is upright: what is seen, and (a, b, c, d, e, f) by hand.
BY_HAND = {
    ("crop", 1): ([100, 100], [2, 0, 100, 0, 2, 0]),
    ("crop", 6): ([100, 100], [0, 2, 0, -2, 0, 300]),
    ("crop", 3): ([100, 100], [-2, 0, 300, 0, -2, 200]),
    ("crop wider", 1): ([100, 100], [4, 0, 0, 0, 4, -100]),
    ("square", 1): ([100, 100], [4, 0, 0, 0, 2, 0]),
    ("square", 2): ([100, 100], [-4, 0, 400, 0, 2, 0]),
    ("padded", 1): ([100, 100], [4, 0, 0, 0, 4, -100]),
    ("padded", 8): ([100, 100], [0, -4, 300, 4, 0, 0]),
    ("shortest side", 5): ([200, 100], [0, 2, 0, 2, 0, 0]),
    ("as it is", 4): ([400, 200], [1, 0, 0, 0, -1, 200]),
    ("as it is", 7): ([400, 200], [0, -1, 200, -1, 0, 400]),
    ("cut", 1): ([80, 60], [1, 0, 160, 0, 1, 70]),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "orientation"), BY_HAND)
def test_the_map_is_the_one_computed_by_hand(kind, orientation):
    size = (200, 400) if orientation > 4 else (400, 200)
    opened = open_image(stored_with(Image.new("RGB", size), orientation))
    seen, affine = BY_HAND[kind, orientation]
    assert KINDS[kind].placement(opened) == {
        "size": [*size], "orientation": orientation, "seen": seen, "to_original": affine,
    }  # fmt: skip
    assert [*KINDS[kind].visible(opened).size] == seen


def ramps(width: int, height: int) -> Image.Image:
    """Each pixel tells its column in red and its row in green; blue tells it from a border."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return Image.fromarray(np.stack([columns, rows, np.full_like(rows, 255)], axis=-1))


def check_by_pixels(visible: Image.Image, place: dict) -> None:
    """Away from borders, each pixel's colour is the place that the map gives."""
    pixels_HW3 = np.asarray(visible).astype(float)
    a, b, c, d, e, f = place["to_original"]
    v, u = np.mgrid[: visible.height, : visible.width] + 0.5
    x, y = a * u + b * v + c, d * u + e * v + f
    width, height = place["size"]
    inside = (x > 6) & (x < width - 6) & (y > 6) & (y < height - 6)
    assert inside.mean() > 0.1 and pixels_HW3[inside][:, 2].min() > 250
    assert np.abs(pixels_HW3[..., 0] - (x - 0.5))[inside].max() < 1.6
    assert np.abs(pixels_HW3[..., 1] - (y - 0.5))[inside].max() < 1.6


@pytest.mark.parametrize(("kind", "orientation"), [*itertools.product(KINDS, range(1, 9))])
def test_the_map_is_that_of_the_pixels(kind, orientation):
    opened = open_image(stored_with(ramps(230, 131), orientation))
    check_by_pixels(KINDS[kind].visible(opened), KINDS[kind].placement(opened))


def test_a_picture_that_is_opened_again_or_at_half_its_size_still_maps_to_its_file():
    data = stored_with(ramps(240, 160), 6, "JPEG")
    once = open_image(data)
    halved = open_image(data, max_pixels=240 * 160 - 1)
    assert halved.size == (80, 120)
    square = KINDS["square"]
    assert square.placement(open_image(once)) == square.placement(once) == square.placement(halved)
    assert square.placement(once)["size"] == [240, 160]


def test_every_way_in_tells_it(tmp_path, capsys):
    model, processor = load()
    file = tmp_path / "a.png"
    file.write_bytes(stored_with(ramps(240, 160), 6))
    side = processor.image.visible(open_image(file)).width
    scale = [round(160 / side, 6), round(240 / side, 6)]
    expected = {"size": [240, 160], "orientation": 6, "seen": [side, side]}
    main(["--image", str(file), str(file), "--prompt", "a?", "--max-tokens", "1", "--json",
          str(tmp_path / "a.json")])  # fmt: skip
    capsys.readouterr()
    chat = Chat(model, processor, max_tokens=1)
    answer = generate(model, processor, "a?", file, max_tokens=1)
    batch = batch_generate(model, processor, ["a?", "a?"], [file, None], max_tokens=1)
    of_chat = chat.ask("a?", io.BytesIO(file.read_bytes())), chat.ask("a?")
    written = json.loads((tmp_path / "a.json").read_text())["images"]
    assert len(written) == 2 and batch[1].images == []
    for place in (
        *written,
        *answer.images,
        *batch[0].images,
        *of_chat[0].images,
        *of_chat[1].images,
    ):
        affine = place["to_original"]
        assert {**place, "to_original": 0} == {**expected, "to_original": 0}
        if processor.image.pad or processor.image.crop is None:
            continue
        assert affine[0] == affine[4] == 0 and affine[1] == -affine[3] > 0, scale


HOSTS = ["llava", "qwen2_5_vl", "qwen3_vl", "smolvlm"]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
    home = host_folders.desk(tmp_path_factory.mktemp("hosts"), HOSTS)
    (home / "ramps.png").write_bytes(stored_with(ramps(230, 131), 8))
    return home, {name: load(home / name) for name in HOSTS}


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("resize", [None, [60, 120]])
@pytest.mark.parametrize("name", HOSTS)
def test_the_map_of_mlx_vlms_models_is_that_of_their_processors(name, resize, hosts):
    home, models = hosts
    image = [home / "b.png", home / "ramps.png"]
    options = {"max_tokens": 1, "host_options": {"resize_shape": resize}}
    answer = generate(*models[name], "w7 w9", image, **options)
    assert len(answer.images) == 2
    place = answer.images[1]
    assert (place["size"], place["orientation"]) == ([230, 131], 8)
    views = [picture for picture, _ in answer.views]
    if name.startswith("qwen"):  # it squeezes the whole picture into whole patches
        rows, columns = answer.views[-1][1]
        assert place["seen"] == [28 * columns, 28 * rows]
        by_hand = [0, -230 / place["seen"][1], 230, 131 / place["seen"][0], 0, 0]
        np.testing.assert_allclose(place["to_original"], by_hand, atol=1e-6)
        return
    assert place["seen"] == [*views[-1].size]
    check_by_pixels(views[-1], place)


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize(
    "kwargs", [{"size": 60, "crop_size": 56}, {"size": 56}, {"size": {"height": 56, "width": 56}}]
)
def test_the_map_knows_the_ways_to_write_a_processors_size(kwargs, hosts):
    home, models = hosts
    answer = generate(*models["llava"], "w7", home / "ramps.png", max_tokens=1,
                      host_options={"processor_kwargs": kwargs})  # fmt: skip
    check_by_pixels(answer.views[0][0], answer.images[0])


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_an_option_that_is_not_known_leaves_the_map_out_and_not_the_answer(
    hosts, monkeypatch, caplog
):
    from mlx_vlm_prune.hosts.families.llava import LlavaHost

    home, models = hosts
    stock = LlavaHost.to_image
    for wrong in ({"size": {"longest_edge": 9}}, {"size": "all"}, {"crop_size": None}):
        monkeypatch.setattr(
            LlavaHost,
            "to_image",
            lambda self, view, size, kwargs, wrong=wrong: stock(self, view, size, wrong),
        )
        answer = generate(*models["llava"], "w7", home / "ramps.png", max_tokens=1)
        assert answer.images[0] == {
            "size": [230, 131], "orientation": 8, "seen": [56, 56], "to_original": None,
        }  # fmt: skip
        assert "where image 0 lies in its file is not known" in caplog.text
        caplog.clear()


MAPPED = ["gemma3", "internvl_chat", "llava_next", "paligemma", "pixtral", "qwen2_vl"]


def whole_view(host, inputs) -> Image.Image:
    """What the family's own processor made of a picture, where that shows all of it."""
    processor = host.processor.image_processor
    if host.kind == "qwen2_vl":
        _, rows, columns = np.array(inputs.extra["image_grid_thw"])[0]
        m, side = processor.merge_size, processor.patch_size
        blocks = np.array(inputs.pixels).reshape(rows // m, columns // m, m, m, 3, -1, side, side)
        pixels_HW3 = blocks[:, :, :, :, :, 0].transpose(0, 2, 5, 1, 3, 6, 4)
        pixels_HW3 = pixels_HW3.reshape(rows * side, columns * side, 3)
    else:
        pixels_I3HW = np.array(mx.array(inputs.pixels)).reshape(-1, 3, *inputs.pixels.shape[-2:])
        pixels_HW3 = pixels_I3HW[host.whole_view].transpose(1, 2, 0)
    if host.kind == "pixtral":
        height, width = np.array(inputs.extra["image_sizes"])[0]
        pixels_HW3 = pixels_HW3[:height, :width]
    mean, std = (np.array(getattr(processor, f"image_{name}")) for name in ("mean", "std"))
    return Image.fromarray((255 * (pixels_HW3 * std + mean)).round().clip(0, 255).astype(np.uint8))


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("family", MAPPED)
def test_the_map_of_each_family_is_that_of_the_pixels_of_its_processor(family, tmp_path):
    from . import stock_folders

    try:
        model, processor = load(stock_folders.checkpoint(family, tmp_path))
    except ValueError as problem:
        if "torchvision" not in str(problem):
            raise
        pytest.skip("this transformers makes the processor by torchvision, which is not installed")
    host = host_of(model, processor)
    for orientation, size in ((8, (230, 131)), (1, (131, 230))):
        file = tmp_path / f"{orientation}.png"
        file.write_bytes(stored_with(ramps(*size), orientation))
        (place,) = generate(model, processor, "w7 w9", file, max_tokens=1).images
        visible = whole_view(host, prepare_prompt(host, "w7 w9", [open_image(file)]))
        assert (place["size"], place["seen"]) == ([*size], [*visible.size])
        check_by_pixels(visible, place)


@pytest.mark.parametrize("size", [(230, 131), (131, 230), (200, 200)])
def test_fastvlms_processor_makes_a_picture_square(size):
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
    from mlx_vlm.models.fastvlm.processing import FastVLMImageProcessor

    from mlx_vlm_prune.hosts.families.fastvlm import FastVLMHost

    sides = {"height": 96, "width": 96}
    processor = FastVLMImageProcessor(size={"shortest_edge": 96}, crop_size=sides,
                                      image_mean=[0.0] * 3, image_std=[1.0] * 3)  # fmt: skip
    opened = open_image(ramps(*size))
    pixels_3HW = np.asarray(processor.preprocess([opened])["pixel_values"][0])
    visible = Image.fromarray((255 * pixels_3HW.transpose(1, 2, 0)).round().astype(np.uint8))
    host = FastVLMHost(None, SimpleNamespace(image_processor=processor))
    seen, to_image = host.to_image(View(0, None), size, {})
    assert seen == visible.size
    check_by_pixels(visible, placement(opened, seen, to_image))
