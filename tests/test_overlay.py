"""Promises of the picture: what was kept is as it was, what was dropped is dim, groups differ."""

import numpy as np
from PIL import Image

from mlx_vlm_prune.generation.overlay import LONG_SIDE, join_images, overlay

GRID, PATCH = (4, 4), LONG_SIDE // 4
LIGHT = Image.new("RGB", (64, 64), (200, 120, 60))


def middle(picture: Image.Image, index: int) -> np.ndarray:
    """The mean colour of a patch, a quarter off its centre: away from borders and dots."""
    y, x = (round((place + 0.3) * PATCH) for place in divmod(index, 4))
    return np.asarray(picture)[y - 5 : y + 5, x - 5 : x + 5].mean(axis=(0, 1))


def groups(*members: list[int]) -> np.ndarray:
    """Weights (K, 16) of slots that are means of their members."""
    weight_KN = np.zeros((len(members), 16), np.float32)
    for k, tokens in enumerate(members):
        weight_KN[k, tokens] = 1 / len(tokens)
    return weight_KN


def test_a_kept_patch_keeps_its_colour_and_a_dropped_one_is_dark():
    picture = overlay(LIGHT, GRID, [0, 5], "two of sixteen")
    np.testing.assert_allclose(middle(picture, 5), (200, 120, 60), atol=1)
    assert middle(picture, 6).mean() < 0.4 * middle(picture, 5).mean()


def test_a_dropped_patch_loses_most_of_its_colour_too():
    picture = overlay(LIGHT, GRID, [0], "one")
    red, _, blue = middle(picture, 9)
    assert red - blue < 0.25 * (200 - 60)


def test_a_merged_group_shares_one_tint_and_its_neighbour_has_another():
    weights = groups([0, 1, 4], [2, 3], [5])
    picture = overlay(LIGHT, GRID, [0, 2, 5], "groups", weights=weights)
    np.testing.assert_allclose(middle(picture, 1), middle(picture, 4), atol=1)
    assert np.abs(middle(picture, 1) - middle(picture, 2)).max() > 20
    np.testing.assert_allclose(middle(picture, 5), (200, 120, 60), atol=1)  # alone: untinted
    assert middle(picture, 15).mean() < 60  # in no group


def test_without_own_patches_brightness_shows_what_is_read():
    weights = np.full((3, 16), 0.01, np.float32)
    weights[:, 10] = 0.85
    picture = overlay(LIGHT, GRID, [], "pooled", weights=weights)
    assert middle(picture, 10).mean() > 2 * middle(picture, 3).mean()


def test_with_everything_kept_the_picture_is_the_image():
    picture = overlay(LIGHT, GRID, range(16), "all")
    inside = np.asarray(picture)[: 4 * PATCH, : 4 * PATCH]
    assert np.abs(inside.astype(int) - (200, 120, 60)).max() <= 1


def test_the_caption_stands_below_and_a_long_one_takes_more_lines():
    short, long = (overlay(LIGHT, GRID, [0], text) for text in ("few words", "many words " * 40))
    assert short.width == long.width == 4 * PATCH
    assert 4 * PATCH < short.height < long.height
    band = np.asarray(short)[4 * PATCH :]
    assert band.min() < 90 < 240 < band.max()  # dark letters on light paper
    edge = np.asarray(long)[:, -6:]
    assert (edge[4 * PATCH :] > 200).all()  # nothing is cut off at the right


def test_lines_of_a_caption_stay_lines():
    one, two = (overlay(LIGHT, GRID, [0], caption) for caption in ("a b", "a\nb"))
    assert two.height > one.height


def test_any_grid_is_drawn_with_whole_patches():
    for rows, columns in ((1, 1), (1, 9), (7, 2), (27, 27)):
        picture = overlay(LIGHT, (rows, columns), [0], "x")
        assert picture.width % columns == 0
        assert picture.width / columns >= 4


def test_a_chain_that_ends_in_no_slot_dims_the_whole_picture():
    none = overlay(LIGHT, GRID, [], "x", weights=np.zeros((0, 16), np.float32))
    assert none == overlay(LIGHT, GRID, [], "x") != overlay(LIGHT, GRID, [0], "x")


def test_the_image_is_left_as_it_was():
    image = LIGHT.copy()
    overlay(image, GRID, [0], "x", weights=groups([0, 1]))
    assert image == LIGHT


def test_several_pictures_stand_side_by_side():
    pictures = [overlay(LIGHT, GRID, [k], "x") for k in range(3)]
    joined = join_images(pictures)
    assert joined.width > 3 * pictures[0].width and joined.height == pictures[0].height
    left = joined.crop((0, 0, *pictures[0].size))
    assert left.tobytes() == pictures[0].tobytes()
