"""Promises of what `pruned` remembers: eight prompts' pictures, the longest unused forgotten
first."""

from dataclasses import replace

import pytest

from mlx_vlm_prune import pruned

from .host_models import KINDS, cached_models
from .test_hosts import stock

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
NAMES = ["llava", "qwen2_5_vl"]


@pytest.fixture(scope="module")
def models():
    return cached_models()


class Talk:
    """Questions about numbered pictures, inside one block."""

    def __init__(self, model, name: str, report):
        self.model, self.first, self.report = model, KINDS[name].inputs(model, 1), report

    def remembered(self, picture: int) -> bool:
        """Ask about a picture: was it answered without the tower?"""
        stock(self.model, replace(self.first, pixels=self.first.pixels + 0.1 * picture))
        return self.report.prompts[-1].tower_skipped


@pytest.fixture
def towers_runs(monkeypatch):
    """Counts the runs of a model's vision tower."""

    def count(model) -> list[None]:
        runs, kind = [], type(model.vision_tower)
        real = kind.__call__
        monkeypatch.setattr(
            kind, "__call__", lambda *args, **kw: (runs.append(None), real(*args, **kw))[1]
        )
        return runs

    return count


@pytest.mark.parametrize("name", NAMES)
def test_of_eight_pictures_the_first_is_still_known_and_of_nine_no_more(models, name):
    model = models(name)
    with pruned(model, "norm", keep_ratio=0.25) as report:
        talk = Talk(model, name, report)
        assert not any(talk.remembered(picture) for picture in range(8))
        assert talk.remembered(0)
        assert not talk.remembered(8)  # in place of picture 1, which is the longest unused
        assert [talk.remembered(picture) for picture in (0, 2, 8)] == [True, True, True]
        assert not talk.remembered(1)


def test_the_tower_runs_for_what_is_not_known_and_only_for_that(models, towers_runs):
    model = models("llava")
    runs = towers_runs(model)
    with pruned(model, "norm", keep_ratio=0.25) as report:
        talk = Talk(model, "llava", report)
        for picture in range(8):
            talk.remembered(picture)
        assert len(runs) == 8
        talk.remembered(0)
        assert len(runs) == 8
        for picture in range(8, 16):
            talk.remembered(picture)
        assert len(runs) == 16
        talk.remembered(0)
        assert len(runs) == 17
