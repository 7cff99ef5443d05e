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


@pytest.mark.parametrize("photographs", [[], ["a.jpg"], ["a.jpg", "b.jpg", "c.jpg"]])
def test_any_other_number_of_photographs_than_two_is_refused(photographs, capsys):
    with pytest.raises(SystemExit) as stop:
        gallery.main(["--draw", *photographs])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ")
