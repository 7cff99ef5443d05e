"""Promises of the PyTorch reference, against transformers and against itself.

Shapes: B prompts, I images, N visual tokens, K kept, L tokens, S = N + 1 with CLS, D features.
"""

from dataclasses import asdict

import numpy as np
import pytest
import torch

from mlx_vlm_prune.checkpoints.config import ATTENTION_POOL, VLMConfig
from mlx_vlm_prune.checkpoints.errors import UserError
from torch_ref.models.loading import load_pth
from torch_ref.models.splice import visible
from torch_ref.models.vlm import VLM
from torch_ref.pruners import METHODS, STAGES, Signals

from . import tiny
from .test_torch_ref_parts import close, llama

CHOOSING = [name for name in METHODS if name not in ("none", "restore", "ivc", "attention_pool")]
# Of a decoder method K is the average over 3 layers, of which the first holds all 16.
EVERY = [("none", tiny.N), *((n, 9 if n in STAGES["decoder"] else 5) for n in CHOOSING)]
# What is chosen does not change when the prompt grows.
BLIND = [case for case in EVERY if case[0] not in (*STAGES["decoder"], "cdpruner", "mmtok")]
POLICIES = ("keep", "renumber")
ROWS = [
    tiny.row("user # what is in the picture ?"),
    tiny.row("# and # is there a red star ?"),
    tiny.row("how many ?"),
]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return tiny.taught(tiny.reference())


@pytest.fixture(scope="module")
def pooled() -> VLM:
    """The same sizes with EfficientVLM's learned pruner of 6 queries."""
    torch.manual_seed(5)
    config = VLMConfig(
        tiny.VISION, tiny.TEXT, image_token_id=tiny.IMAGE, pruner=(ATTENTION_POOL, 6)
    )
    model = VLM(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def pixels_I3HW() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


# --- splicing and positions -----------------------------------------------------------


def test_logits_are_those_of_llama_reading_the_kept_tokens_by_hand(vlm, pixels_I3HW):
    """Two words, an image of 16 of which tokens 0, 2, 8 and 10 stay, one word."""
    row = tiny.Prompt([7, 8, *[tiny.IMAGE] * 16, 9], [(2, 16)])
    theirs = llama(vlm)
    seen_1ND = vlm.projector(vlm.tower(pixels_I3HW[:1]).signals.x_BND)
    words_1LD = theirs.get_input_embeddings()(torch.tensor([[7, 8, 9]]))
    pieces = [words_1LD[:, :2], seen_1ND[:, [0, 2, 8, 10]], words_1LD[:, 2:]]
    embeds_1LD = torch.cat(pieces, dim=1)
    by_hand = {"keep": [0, 1, 2, 4, 10, 12, 18], "renumber": [0, 1, 2, 3, 4, 5, 6]}
    for policy, positions in by_hand.items():
        ours = vlm.logits([row], pixels_I3HW[:1], "uniform", 4, policy)
        close(ours, theirs(inputs_embeds=embeds_1LD, position_ids=torch.tensor([positions])).logits)


def test_the_two_position_policies_differ_once_tokens_are_gone(vlm, pixels_I3HW):
    keep, count = (vlm.logits(ROWS[:1], pixels_I3HW[:1], "norm", 5, p) for p in POLICIES)
    assert (keep - count).abs().max() > 1e-3 * keep.abs().max()


def test_a_placeholder_in_the_users_text_stays_a_word(vlm, pixels_I3HW):
    typed = tiny.Prompt([tiny.IMAGE, *[tiny.IMAGE] * 16, 9], [(1, 16)])
    spliced, _ = vlm.embed([typed], pixels_I3HW[:1], "none", None, "keep", {})
    close(spliced.embeds_BLD[0, 0], vlm.language.embed_tokens.weight[tiny.IMAGE])
    close(spliced.embeds_BLD[:, 1:17], vlm.projector(vlm.tower(pixels_I3HW[:1]).signals.x_BND))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("name", "K"), EVERY)
def test_a_batch_equals_one_prompt_at_a_time(vlm, pixels_I3HW, name, K, policy):
    together = vlm.logits(ROWS, pixels_I3HW, name, K, policy)
    first = 0
    for b, row in enumerate(ROWS):
        row_pixels_I3HW = pixels_I3HW[first : first + len(row.runs)]
        first += len(row.runs)
        alone = vlm.logits([row], row_pixels_I3HW, name, K, policy)[0]
        close(together[b, -len(alone) :], alone)
    assert together.isfinite().all()  # on padding too


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CHOOSING)
def test_keeping_all_gives_the_unpruned_bits(vlm, pixels_I3HW, name, policy):
    full = vlm.logits(ROWS, pixels_I3HW)
    assert vlm.logits(ROWS, pixels_I3HW, name, tiny.N, policy).equal(full)
    assert vlm.logits(ROWS, pixels_I3HW, name, dict(EVERY)[name], policy).shape != full.shape


def test_a_token_sees_itself_and_what_is_before_it_but_no_padding():
    seen_1LL = visible(torch.tensor([[False, True, True]]))
    assert seen_1LL.int().tolist() == [[[1, 0, 0], [0, 1, 0], [0, 1, 1]]]  # padding: itself only


def test_a_method_reads_the_layer_it_is_told(vlm, pixels_I3HW):
    row_IN = vlm.tower(pixels_I3HW, {"cls_attention": 0}).signals.cls_attention_BN
    assert row_IN is not None
    spliced, _ = vlm.embed(ROWS[:1], pixels_I3HW[:1], "cls_attention", 4, "keep", {"layer": 0})
    best = np.sort(np.argsort(-row_IN[0].numpy(), kind="stable")[:4])
    start = ROWS[0].runs[0][0]
    assert (spliced.positions_BL[0, start : start + 4] - start).tolist() == best.tolist()


# --- decoding -------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("name", "K"), BLIND)
def test_cached_decoding_equals_the_cache_free_recomputation(vlm, pixels_I3HW, name, K, policy):
    state = vlm.prefill(*vlm.embed(ROWS, pixels_I3HW, name, K, policy))
    answer_ids = tiny.row("yes the red star is left of it").ids
    for i in range(len(answer_ids) + 1):
        longer = [tiny.Prompt([*row.ids, *answer_ids[:i]], row.runs) for row in ROWS]
        close(state.logits_BV, vlm.logits(longer, pixels_I3HW, name, K, policy)[:, -1])
        if i < len(answer_ids):
            vlm.step(state, torch.full((len(ROWS),), answer_ids[i]))


def greedy(vlm: VLM, pixels_I3HW, name: str, K: int, policy: str, tokens: int) -> list[list[int]]:
    """The same without a cache: everything is read again for every token."""
    rows: list = list(ROWS)
    for _ in range(tokens):
        best_B = vlm.logits(rows, pixels_I3HW, name, K, policy)[:, -1].argmax(-1).tolist()
        rows = [tiny.Prompt([*r.ids, t], r.runs) for r, t in zip(rows, best_B, strict=True)]
    return [row.ids[len(first.ids) :] for row, first in zip(rows, ROWS, strict=True)]


def endless(vlm: VLM) -> VLM:
    """The same model with an end token that no score can choose."""
    model = VLM(vlm.config).eval()
    model.eos_token_id = -1
    model.load_state_dict(vlm.state_dict())
    return model


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("name", "K"), [("none", 16), ("norm", 5), ("similarity", 4)])
def test_generate_says_what_recomputation_without_a_cache_says(vlm, pixels_I3HW, name, K, policy):
    model = endless(vlm)
    answers = model.generate(*model.embed(ROWS, pixels_I3HW, name, K, policy), max_tokens=6)
    assert answers == greedy(vlm, pixels_I3HW, name, K, policy, 6)


def test_each_row_stops_at_its_own_end_token(vlm, pixels_I3HW):
    model = endless(vlm)
    read = model.embed(ROWS, pixels_I3HW)
    answers = model.generate(*read, max_tokens=6)
    model.eos_token_id = answers[0][2]
    expected = [row[: row.index(answers[0][2])] if answers[0][2] in row else row for row in answers]
    assert model.generate(*read, max_tokens=6) == expected
    assert len(expected[0]) <= 2


# --- the learned pruner ---------------------------------------------------------------


def test_pooled_slots_are_renumbered_whatever_the_policy(pooled, pixels_I3HW):
    keep, count = (pooled.logits(ROWS, pixels_I3HW, "attention_pool", None, p) for p in POLICIES)
    assert keep.equal(count)
    spliced, _ = pooled.embed(ROWS[:1], pixels_I3HW[:1], "attention_pool", None, "keep", {})
    length = len(ROWS[0].ids) - tiny.N + 6
    assert spliced.positions_BL.tolist() == [list(range(length))]
    assert spliced.next_B.tolist() == [length]


def test_pooled_tokens_are_mixtures_of_the_learned_values_projected(pooled, pixels_I3HW):
    pool, x_1ND = pooled.pool, pooled.tower(pixels_I3HW[:1]).signals.x_BND
    q_KD, k_1ND = pool.pool_q_proj(pool.pool_queries), pool.pool_k_proj(x_1ND)
    share_1KN = (q_KD @ k_1ND.mT / q_KD.shape[-1] ** 0.5).softmax(-1)
    spliced, _ = pooled.embed(ROWS[:1], pixels_I3HW[:1], "attention_pool", None, "keep", {})
    start = ROWS[0].runs[0][0]
    by_hand_1KD = pooled.projector(share_1KN @ pool.pool_v_proj(x_1ND))
    close(spliced.embeds_BLD[:, start : start + 6], by_hand_1KD)


def test_pooled_tokens_are_the_softmax_of_the_queries_worked_by_hand():
    from torch_ref.pruners.attention_pool import AttentionPool

    pool = AttentionPool(1, 4)
    for projection in (pool.pool_q_proj, pool.pool_k_proj, pool.pool_v_proj):
        projection.weight.data, projection.bias.data = torch.eye(4), torch.zeros(4)
    pool.pool_queries.data = torch.tensor([[2.0, 0, 0, 0]])
    x_1ND = torch.tensor([[[np.log(3), 0, 0, 0], [0, 8.0, 0, 0]]], dtype=torch.float32)
    kept = pool.prune(Signals(x_1ND, (1, 2)), 1)  # scores 2 ln 3 / sqrt(4) and 0: shares 3/4, 1/4
    close(kept.tokens(x_1ND), torch.tensor([[[0.75 * np.log(3), 2.0, 0, 0]]]).float())


def test_a_budget_that_the_learned_pruner_was_not_trained_for_is_refused(pooled, pixels_I3HW):
    with pytest.raises(UserError, match="attention_pool keeps 6 tokens, not 5"):
        pooled.logits(ROWS, pixels_I3HW, "attention_pool", 5)


def test_cached_decoding_with_a_learned_pruner_equals_recomputation(pooled, pixels_I3HW):
    state = pooled.prefill(*pooled.embed(ROWS, pixels_I3HW, "attention_pool"))
    pooled.step(state, torch.tensor([9, 9, 9]))
    longer = [tiny.Prompt([*row.ids, 9], row.runs) for row in ROWS]
    close(state.logits_BV, pooled.logits(longer, pixels_I3HW, "attention_pool")[:, -1])


# --- reading what is published --------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("which", ["vlm", "pooled"])
def test_load_pth_reads_every_weight_of_the_published_layout(request, tmp_path, which, dtype):
    model = request.getfixturevalue(which)
    read = load_pth(*tiny.publish(model, tmp_path, dtype), device=CPU)
    held, expected = read.state_dict(), model.state_dict()
    assert held.keys() == expected.keys()
    assert all(held[name].equal(expected[name].to(dtype).float()) for name in held)
    assert read.config.vision == tiny.VISION
    assert read.config.text == tiny.TEXT
    assert read.config.pruner == model.config.pruner


def test_load_pth_reads_a_tower_that_transformers_saved(vlm, tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    pth, _ = tiny.publish(vlm, tmp_path)
    theirs = CLIPVisionModel(CLIPVisionConfig(**asdict(tiny.VISION)))
    theirs.save_pretrained(tmp_path / "saved")
    read = load_pth(pth, tmp_path / "saved", device=CPU)
    saved = theirs.state_dict()
    assert all(saved[name].equal(tensor) for name, tensor in read.tower.state_dict().items())


# --- what a user can get wrong --------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "part"),
    [
        ({"pruner": "nrom"}, "no pruner is called 'nrom'"),
        ({"pruner": "attention_pool"}, "holds no weights"),
        ({"pruner": "none", "K": 5}, "none keeps all 16"),
        ({"pruner": "norm", "K": 0}, "keep 1 to 16"),
        ({"pruner": "norm", "K": 17}, "keep 1 to 16"),
        ({"positions": "count"}, "keep or renumber"),
        ({"pixels_I3HW": None}, "place 3 images, and 0 are given"),
        ({"prompts": [], "pixels_I3HW": None}, "at least one prompt"),
    ],
)
def test_what_does_not_fit_is_refused(vlm, pixels_I3HW, how, part):
    with pytest.raises(ValueError, match=part):
        vlm.logits(**{"prompts": ROWS, "pixels_I3HW": pixels_I3HW, **how})
