"""Promises of twig:rank=R, TwigVLM's attention_rank: how many tokens go on, without a budget."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.evaluation.budgeted_methods import why_not_trained
from mlx_vlm_prune.inputs.budget import budget
from mlx_vlm_prune.pruners import METHODS, plan
from torch_ref.pruners import METHODS as REFERENCE
from torch_ref.pruners.spec import parse_steps

from . import tiny
from .test_twig import pair  # noqa: F401 - a fixture


@pytest.mark.parametrize("methods", [METHODS, REFERENCE])
@pytest.mark.parametrize(("average", "rank"), [(192, 227), (128, 134), (64, 41)])
def test_a_rank_is_the_number_that_goes_on_as_in_the_authors_first_readme(methods, average, rank):
    """`attention_rank: 41` of MILVLG/twigvlm is what an average of 64 leaves."""
    for K in (1, average, 575):
        assert methods["twig"].schedule(32, 576, K, rank=rank) == {2: rank, 24: 0}
    base = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=32))
    assert methods["twig"].own_budget(base, 576, rank=rank) == average
    assert methods["twig"].own_budget(base, 576) is None


def test_a_rank_needs_no_budget_and_allows_no_other(pair):  # noqa: F811
    learned = {"twig": pair.twigs[2][1]}
    pipeline = plan("twig:rank=4", learned)
    assert budget(tiny.N, None, None, pipeline) == pipeline.own_budget(tiny.N) == 6  # (16 + 4) / 3
    assert budget(tiny.N, 1, None, pipeline) == tiny.N
    for ratio, tokens in ((0.5, None), (None, 6)):
        with pytest.raises(UserError, match="says itself how many visual tokens stay"):
            budget(tiny.N, ratio, tokens, pipeline)
    row = tiny.row("user # what is it ?")
    words = len(row.ids) - tiny.N
    pixels = mx.array(np.random.default_rng(2).normal(size=(1, 64, 64, 3)).astype(np.float32))
    by_rank = pair.ours([row], pixels, pipeline, 6)
    assert [c.rows - words for c in by_rank.cache] == [16, 4, 0]
    by_budget = pair.ours([row], pixels, plan("twig", learned), 6)
    assert [c.rows - words for c in by_budget.cache] == [16, 2, 0]
    assert why_not_trained(pipeline, 8, tiny.N) and not why_not_trained(pipeline, 6, tiny.N)
    for rank in (-1, 17):
        with pytest.raises(UserError, match=f"rank is {rank}; of 16 visual tokens 1 to 16"):
            budget(tiny.N, None, None, plan(f"twig:rank={rank}", learned))


def test_the_reference_reads_the_same_option():
    (step,) = parse_steps("twig:rank=41", 576, 64)
    assert step.call("schedule", 32, 576, 64) == {2: 41, 24: 0}
