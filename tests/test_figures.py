"""Promises of the figures: each is drawn from the results, labels what it shows, and is shipped."""

import re

import pytest
from PIL import Image

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from benchmarks import figures
from benchmarks.readme_tables import speed_rows
from benchmarks.report import RESULTS, scenes
from mlx_vlm_prune.plots.panels import frontier
from mlx_vlm_prune.plots.style import BASELINES
from mlx_vlm_prune.scenes import KINDS


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    figures.draw(folder)
    return folder


def svg_texts(file) -> set[str]:
    return set(re.findall(r"<text[^>]*>([^<]+)</text>", file.read_text(encoding="utf-8")))


ALL = (*figures.PANELS, figures.DASHBOARD)


def test_every_figure_is_drawn_as_vectors_and_as_pixels(drawn):
    for name in ALL:
        assert (drawn / f"{name}.svg").stat().st_size > 1000
        with Image.open(drawn / f"{name}.png") as picture:
            assert min(picture.size) > 300


def test_every_figure_is_shipped_and_no_other():
    shipped = {path.name for path in figures.FIGURES.iterdir()}
    assert shipped == {f"{name}.{kind}" for name in ALL for kind in ("svg", "png")}


def test_a_figure_drawn_twice_is_the_same_file(drawn, tmp_path):
    figures.draw(tmp_path)
    for name in ALL:
        assert (tmp_path / f"{name}.svg").read_bytes() == (drawn / f"{name}.svg").read_bytes()


def test_the_lines_are_named_baselines_first_of_all(drawn):
    named = svg_texts(drawn / "accuracy-by-tokens.svg")
    assert set(BASELINES) <= named
    assert set(figures.best_methods(scenes(RESULTS), figures.QUARTER)) <= named


def test_the_kinds_and_every_method_that_can_are_in_the_map(drawn):
    measured = {
        n for n, rows in figures.single_methods(scenes(RESULTS)).items() if figures.QUARTER in rows
    }
    assert {*KINDS, *measured} <= svg_texts(drawn / "kinds.svg")


def test_the_frontier_is_what_nothing_beats_in_both():
    points = [(10, 50), (20, 40), (20, 70), (30, 70), (40, 90), (5, 20)]
    assert frontier(points) == [(5, 20), (10, 50), (20, 70), (40, 90)]


def test_time_and_memory_are_drawn_for_every_shape_that_was_measured(drawn):
    shapes = {row["shape"] for row in speed_rows(RESULTS)}
    assert shapes <= svg_texts(drawn / "memory.svg")
    bars = svg_texts(drawn / "where.svg")
    assert {f"{shape}, full" for shape in shapes} <= bars


def test_the_page_names_the_machine_and_holds_every_panel(drawn):
    dashboard = svg_texts(drawn / "dashboard.svg")
    assert any("cores" in text and "MLX" in text for text in dashboard)
    for name in figures.PANELS:
        assert svg_texts(drawn / f"{name}.svg") & dashboard
