"""Promises of `benchmarks.gallery --draw`: a picture of each method that the built-in model has."""

import pytest
from PIL import Image

from benchmarks import gallery, gallery_page
from mlx_vlm_prune import load
from mlx_vlm_prune.pruners import METHODS


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The names of the pictures that `draw` writes; the tiles are empty."""
    monkeypatch.setattr(gallery, "PICTURES", tmp_path / "pictures")
    monkeypatch.setattr(gallery, "_images", lambda photographs: [Image.new("RGB", (8, 8))])
    monkeypatch.setattr(gallery, "_tile", lambda model, processor, image, name: image)
    gallery.draw([])
    return {file.stem for file in (tmp_path / "pictures").glob("*.jpg")}


def test_a_learned_method_without_weights_is_left_out_and_those_behind_it_are_drawn(drawn):
    unusable = {*METHODS} - {*gallery_page.usable_methods(load()[0])}
    assert "learn_prune" in unusable and not drawn & unusable
    assert {"twig", "score_prune", "divprune"} <= drawn


def test_the_pictures_that_lie_in_the_documentation_are_those(drawn):
    assert {file.stem for file in gallery.ROOT.glob("docs/pruners/*.jpg")} == drawn


def test_one_method_is_drawn_by_its_name_and_no_other_picture_is_touched(drawn, monkeypatch):
    written = []
    monkeypatch.setattr(gallery, "join_images", lambda tiles: written.append(1) or tiles[0])
    gallery.draw([], ["divprune"])
    assert written == [1]


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--draw", "a.jpg", "b.jpg", "--pruner", "learn_prune"], "--pruner is 'learn_prune'; can"),
        (["--pruner", "divprune"], "--pruner is for --draw"),
    ],
)
def test_a_method_that_cannot_be_drawn_is_refused(argv, why, capsys):
    with pytest.raises(SystemExit) as stop:
        gallery.main(argv)
    assert stop.value.code == 2 and why in capsys.readouterr().err


@pytest.mark.parametrize("photographs", [[], ["a.jpg"], ["a.jpg", "b.jpg", "c.jpg"]])
def test_any_other_number_of_photographs_than_two_is_refused(photographs, capsys):
    with pytest.raises(SystemExit) as stop:
        gallery.main(["--draw", *photographs])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ")
