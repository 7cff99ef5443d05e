"""`budget=similarity`: an image keeps tokens as it has unlike ones, in every way in.

Shapes: N tokens, D features, K kept.
"""

import math

import mlx.core as mx
import numpy as np
import pytest
import torch

import torch_ref.pruners as ref
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.families import host_of
from mlx_vlm_prune.hosts.prompt import budgets_by_view, encode_images_and_text, prune_prompt
from mlx_vlm_prune.pruners import METHODS, plan, resolve
from mlx_vlm_prune.pruners.image_budgets import image_budgets

from . import test_evaluate, tiny
from .host_models import KINDS
from .pruner_cases import case, signals
from .test_evaluate import run

_cache, home = test_evaluate._cache, test_evaluate.home  # fixtures
SPEC = "divprune:budget=similarity"


def spread_by_loops(x_ND: np.ndarray) -> float:
    """1 less the mean cosine of all pairs."""
    cosines = []
    for i, u in enumerate(x_ND.tolist()):
        for v in x_ND.tolist()[:i]:
            lengths = math.dist(u, [0] * len(u)) * math.dist(v, [0] * len(v))
            cosines.append(sum(a * b for a, b in zip(u, v, strict=True)) / lengths)
    return 1 - sum(cosines) / len(cosines)


def images_of_several_spreads() -> np.ndarray:
    """Five images (5, 25, 8) whose tokens are more and more alike."""
    x_BND = np.random.default_rng(3).normal(size=(5, 25, 8)).astype(np.float32)
    shift_B11 = np.array([0, 0.3, 0.6, 1.2, 3], np.float32)[:, None, None]
    return x_BND + shift_B11


@pytest.mark.parametrize("reference", [0.5, 0.9])
def test_a_budget_is_k_times_the_spread_over_the_reference_from_half_to_twice_k(reference):
    x_BND, K = images_of_several_spreads(), 12
    shares = [spread_by_loops(x_ND) / reference for x_ND in x_BND]
    expected = [int(K * min(max(share, 0.5), 2) + 0.5) for share in shares]
    assert image_budgets(mx.array(x_BND), K, reference) == expected
    assert len(set(expected)) > 3 and min(expected) == K // 2
    step = ref.Step("divprune", K, reference=reference)
    twins = ref.Signals(torch.from_numpy(x_BND), (5, 5))
    assert step.image_budgets(twins, twins, K) == expected
    alone = [image_budgets(mx.array(x_BND[b : b + 1]), K, reference)[0] for b in range(5)]
    assert alone == expected


def test_worked_by_hand():
    """Of four tokens two and two are alike: two of six pairs have cosine 1, four 0, so 2/3."""
    two = mx.array([[[1.0, 0], [0, 2], [3, 0], [0, 1]]])
    assert image_budgets(two, 6, 2 / 3) == [6]
    assert image_budgets(two, 6, 1.0) == [4]
    assert image_budgets(mx.ones((1, 4, 2)), 6, 0.5) == [3]  # half at least
    assert image_budgets(mx.ones((1, 1, 2)), 1, 0.5) == [2]  # one token has no pair: none is lost


def test_a_specification_says_it_and_a_chain_reads_it_of_each_method():
    chain = plan(f"norm:keep=9+{SPEC},reference=0.3+fastv")
    assert [step.reference for step in chain.steps] == [None, 0.3, None]
    assert chain.spec == f"norm:keep=9+{SPEC},reference=0.3+fastv" and chain.has_dynamic_budget
    assert plan(chain.spec) == chain
    assert plan(f"{SPEC},reference=0.65").spec == SPEC
    with pytest.raises(UserError, match="leave budget out"):
        weights = {"mlp": METHODS["mlp"].make_weights(8, 0)}
        plan("mlp:dynamic,budget=similarity", weights)
    with pytest.raises(UserError, match="was trained for 6 visual tokens; leave budget out"):
        pool = METHODS["attention_pool"].make_weights(8, 6)
        plan("attention_pool:budget=similarity", {"attention_pool": pool})


def test_it_goes_by_what_the_tower_gave_not_by_what_a_method_left():
    arrays = case("random", 1, (5, 5), 0)
    encoded = signals(arrays)
    alike = encoded.replace(x_BND=mx.ones((1, 9, 8)), grid=(3, 3))
    pruner = resolve(f"{SPEC},reference=0.9")
    assert pruner.budgets(alike, encoded, 6) == pruner.budgets(encoded, encoded, 6) != [3]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same random weights in the reference and in MLX."""
    from mlx_vlm_prune.hosts.loading import load

    reference = tiny.reference()
    model, _ = load(tiny.checkpoint(reference, tmp_path_factory.mktemp("pair")), dtype="float32")
    return model, reference


ROWS = (tiny.row("user # what is in the picture ?"), tiny.row("# and # is there a red star ?"))
CHAINS = (
    SPEC, "prunesid:budget=similarity", "norm:budget=similarity+sparsevlm", f"tome:keep=14+{SPEC}",
    f"{SPEC}+restore", f"norm:budget=similarity,reference=0.5+{SPEC}",
)  # fmt: skip


def pictures() -> np.ndarray:
    """Three pictures: one of noise, one of less on a grey ground, one all of one colour."""
    noise = np.random.default_rng(0).normal(size=(3, 64, 64, 3)).astype(np.float32)
    strength, ground = np.array([[1, 0.3, 0], [0, 0.3, 5]], np.float32).reshape(2, 3, 1, 1, 1)
    return noise * strength + ground


@pytest.mark.parametrize("spec", CHAINS)
def test_prompts_give_in_a_batch_what_they_give_alone(pair, spec):
    model, pixels, chain, image = pair[0], pictures(), plan(spec), 0
    together = model(list(ROWS), mx.array(pixels), chain, 8)
    ahead = [step for step in together.trace.steps if step.layer == 0][-1]
    assert len({one.slots for one in ahead.reductions}) > 1
    for b, row in enumerate(ROWS):
        images, image = pixels[image : image + len(row.runs)], image + len(row.runs)
        alone = model([row], mx.array(images), chain, 8)
        assert alone.rows[0] == together.rows[b]
        np.testing.assert_allclose(
            np.array(alone.logits_BLV)[0], np.array(together.logits_BLV)[b], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("spec", [*CHAINS, "zoo_prune", "zoo_prune:directions=3,step=0.1,seed=4"])
def test_the_reference_gives_the_same_logits_of_each_picture(pair, spec):
    from torch_ref.pruners.spec import parse_steps, positions

    model, reference = pair
    for pixels in pictures()[:2]:
        ours = model(ROWS[:1], mx.array(pixels[None]), plan(spec), 8)
        steps = parse_steps(spec, 16, 8)
        read = reference.embed(
            ROWS[:1], torch.from_numpy(pixels[None]).permute(0, 3, 1, 2), steps, 8, positions(steps)
        )
        with torch.no_grad():
            theirs = reference.prefill(*read).logits_BV.numpy()
        np.testing.assert_allclose(np.array(ours.logits_BV), theirs, rtol=1e-4, atol=1e-4)


def test_where_all_tokens_stay_they_stay_in_every_image(pair):
    chain = plan(f"{SPEC},reference=1.5")
    prefill = pair[0](list(ROWS), mx.array(pictures()), chain, 16)
    full = pair[0](list(ROWS), mx.array(pictures()), plan("none"), 16)
    assert prefill.trace.left_of_images() == (16, 16, 16)
    np.testing.assert_array_equal(np.array(prefill.logits_BLV), np.array(full.logits_BLV))


def test_the_reference_takes_one_picture_at_a_time_where_budgets_differ(pair):
    from torch_ref.pruners.spec import parse_steps

    steps = parse_steps(SPEC, 16, 8)
    pixels = torch.from_numpy(pictures()).permute(0, 3, 1, 2)
    with pytest.raises(UserError, match="are recomputed one at a time"):
        pair[1].embed(list(ROWS), pixels, steps, 8)


@pytest.mark.parametrize("kind", ["llava", "llava_next", "qwen2_5_vl", "smolvlm"])
def test_in_mlx_vlms_models_each_view_keeps_its_own(kind):
    model = KINDS[kind].make()
    host, inputs, chain = host_of(model), KINDS[kind].inputs(model), plan(f"{SPEC},reference=1")
    views = encode_images_and_text(host, inputs, chain)
    budgets = budgets_by_view(views, 0.5, None, chain)
    expected = [
        min(image_budgets(view.signals.x_BND, K, 1.0)[0], view.signals.x_BND.shape[1])
        for view, K in zip(views, budgets, strict=True)
    ]
    prompt = prune_prompt(host, inputs, views, chain, budgets, "renumber")
    assert [one.slots for one in prompt.trace.steps[-1].reductions] == expected
    total = sum(view.signals.x_BND.shape[1] for view in views)
    assert sum(expected) < total


def test_an_evaluation_says_how_many_tokens_images_kept(home, tmp_path, capsys):
    spec = f"{SPEC},reference=0.7"
    result = run(home, tmp_path / "e.json", "--keep-tokens", "6", "--pruner", spec)
    row = next(row for row in result["rows"] if row["pruner"] == spec)
    assert row["tokens"] == 6 and 3 <= row["kept"] <= 12
    others = [row for row in result["rows"] if row["pruner"] != spec]
    assert others and all("kept" not in row for row in others)
    printed = capsys.readouterr().out
    assert f"{spec} at 6 kept {row['kept']:g} of an image, the mean." in printed
