"""Overlays of models that cut an image into tiles: the tiles lie in their image again."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.generation.overlay import GAP, LONG_SIDE, OVERVIEW_SIDE, draw_trace
from mlx_vlm_prune.generation.tiles import DrawnView, Layout, join_tiles, nearest_layout
from mlx_vlm_prune.hosts.families.internvl_chat import InternVLHost
from mlx_vlm_prune.hosts.families.llava_next import LlavaNextHost
from mlx_vlm_prune.pruners.contract import Reduction
from mlx_vlm_prune.pruners.trace import ReductionStep, Trace

from . import host_folders

SIZES = [
    (w, h) for w in (30, 61, 113, 170, 224, 300, 451) for h in (31, 56, 97, 150, 230, 333, 448)
]


def tile(kept: list[int], colour: int = 0, weights: np.ndarray | None = None) -> DrawnView:
    return DrawnView(Image.new("RGB", (6, 4), (colour,) * 3), (2, 3), kept, weights)


def test_patches_of_tiles_are_numbered_in_the_whole_grid():
    """Two by two tiles of two rows of three: rows of six."""
    tiles = [tile([0, 5], 10), tile([1], 20), tile([], 30), tile([3, 4], 40)]
    joined = join_tiles(tiles, 2, 2)
    assert joined.grid == (4, 6) and joined.kept == [0, 8, 4, 21, 22]
    assert joined.picture.size == (12, 8) and joined.weights is None
    places = [(0, 0), (11, 3), (0, 7), (11, 7)]
    assert [joined.picture.getpixel(place)[0] for place in places] == [10, 20, 30, 40]


def test_slots_that_mix_patches_mix_those_of_their_tile():
    mixed = np.array([[0.5, 0.5, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1.0]])
    joined = join_tiles([tile([2, 4]), tile([0, 5], weights=mixed)], 1, 2)
    assert joined.kept == [2, 7, 3, 11] and joined.weights.shape == (4, 12)
    rows = [{n: w for n, w in enumerate(row) if w} for row in joined.weights]
    assert rows == [{2: 1}, {7: 1}, {3: 0.5, 4: 0.5}, {11: 1}]


@pytest.mark.parametrize("edge", [2, 4, 5])
def test_rows_and_columns_are_those_of_idefics3s_processor(edge):
    from transformers import Idefics3ImageProcessor

    processor = Idefics3ImageProcessor(
        size={"longest_edge": 14 * edge}, max_image_size={"longest_edge": 14}
    )
    for width, height in SIZES:
        image = Image.new("RGB", (width, height))
        cut = processor([[image]], return_row_col_info=True, return_tensors="np")
        rows, columns = cut["rows"][0][0], cut["cols"][0][0]
        assert rows * columns + 1 == cut["pixel_values"].shape[1]
        assert nearest_layout(rows * columns + 1, image.size) == Layout(
            rows, columns, overview=rows * columns
        )


def test_rows_and_columns_are_those_of_internvls_processor():
    processor = pytest.importorskip("mlx_vlm.models.internvl_chat.processor")
    for has_overview in (True, False):
        image_processor = SimpleNamespace(dynamic_use_thumbnail=has_overview)
        host = InternVLHost(None, SimpleNamespace(image_processor=image_processor))
        for width, height in SIZES:
            image = Image.fromarray(np.arange(width, dtype=np.uint8)[None].repeat(height, 0))
            views = processor.dynamic_preprocess(image, image_size=16, use_thumbnail=has_overview)
            layout = host.layout(len(views), image.size)
            assert layout.views == len(views)
            whole = Image.new("L", (16 * layout.columns, 16 * layout.rows))
            for t in range(layout.rows * layout.columns):
                whole.paste(views[t], (t % layout.columns * 16, t // layout.columns * 16))
            assert whole == image.resize(whole.size, Image.Resampling.BICUBIC)


def test_rows_and_columns_are_those_of_llava_nexts_processor():
    from transformers.models.llava_next import image_processing_pil_llava_next as published

    pinpoints = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    processor = published.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=pinpoints, do_normalize=False, do_rescale=False,
    )  # fmt: skip
    vision = SimpleNamespace(image_size=28)
    config = SimpleNamespace(vision_config=vision)
    host = LlavaNextHost(SimpleNamespace(config=config), SimpleNamespace(image_processor=processor))
    for width, height in SIZES:
        ramp = np.linspace(0, 255, height)[:, None] + np.zeros((1, width))
        image = Image.fromarray(np.stack([ramp] * 3, -1).astype(np.uint8))
        pixels = np.array(processor([image], return_tensors="np")["pixel_values"])[0]
        layout = host.layout(len(pixels), image.size)
        assert layout.views == len(pixels) and layout.overview == 0
        means = [view[view > 0].mean() if view.any() else 0 for view in pixels[1:]]
        rows = np.reshape(means, (layout.rows, layout.columns))
        assert layout.rows == 1 or (np.diff(rows, axis=0) > 0).all(), "it grows lighter downwards"


def trace_of(kept: list[list[int]], images: list[int]) -> Trace:
    import mlx.core as mx

    reductions = [Reduction(index_BK=mx.array([index], mx.int32)) for index in kept]
    return Trace([ReductionStep("norm", 0, reductions)], [6] * len(kept), images)


def test_an_image_in_tiles_is_one_panel_and_one_image_alone_another():
    views = [(Image.new("RGB", (6, 4), "white"), (2, 3))] * 7
    trace = trace_of([[0]] * 7, [0] * 6 + [1])
    layouts = [Layout(1, 5, overview=5), Layout(1, 1)]
    apart, together = (draw_trace(trace, views, "x", each) for each in ((), layouts))
    patch = round(LONG_SIDE / 15)
    panel = 15 * patch + GAP + 3 * round(OVERVIEW_SIDE / 3)
    alone = 3 * round(LONG_SIDE / 3)
    assert together.width == panel + GAP + alone
    assert apart.width == 7 * alone + 6 * GAP
    pixels = np.asarray(together)
    bright = [pixels[patch // 2, column * patch + patch // 2].mean() > 200 for column in range(15)]
    assert bright == [column % 3 == 0 for column in range(15)], "the first patch of each tile"


def test_a_smolvlms_picture_is_whole_again(tmp_path):
    """112 x 56 pixels: two tiles of two by two tokens, and the whole."""
    model, processor = load(host_folders.checkpoint("smolvlm", tmp_path))
    image = Image.new("RGB", (112, 56), "red")
    image.paste((0, 0, 255), (56, 0, 112, 56))
    answer = generate(
        model, processor, "w7 w9", image=image, pruner="norm", keep_ratio=1.0, max_tokens=1
    )
    assert answer.layouts == [Layout(1, 2, overview=2)] and len(answer.views) == 3
    drawn = answer.overlay()
    side = 4 * round(LONG_SIDE / 4)
    assert drawn.width == side + GAP + 2 * round(OVERVIEW_SIDE / 2)
    red, blue = (drawn.getpixel((x, side // 4)) for x in (side // 4, 3 * side // 4))
    assert red[0] > 200 > red[2] and blue[2] > 200 > blue[0]
