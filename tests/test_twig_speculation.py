"""Promises of speculative decoding: the answer stays what it is, and so does what caches hold.

Shapes: I images, L rows, V words.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generation import speculation as speculate
from mlx_vlm_prune.generation.speculation import Speculation
from mlx_vlm_prune.hosts.loading import load
from mlx_vlm_prune.models.decoder import TwigReader
from mlx_vlm_prune.pruners import plan
from torch_ref.generation.speculation import speculate as theirs
from torch_ref.models.language.twig import Twig, grown
from torch_ref.models.vlm import VLM, VLMConfig

from . import tiny
from .pruner_cases import close
from .test_model import Replaying, steps_of

TEXT = replace(tiny.TEXT, num_hidden_layers=5)
K, LONGEST = 9, 24  # tokens of an answer
SPECS = ["none", "twig", "fastv", "cls_attention", "avgpool", "cls_attention+restore", "tome+vtw"]
ROW = tiny.row("user # what is left of # ?")
NO_END: frozenset[int] = frozenset()


def perfect(language, layer: int) -> Twig:
    """All the base's layers above: it says what the base says."""
    return grown(language, layer, len(language.layers) - layer)


def noisy(language, layer: int, noise: float) -> Twig:
    twig = perfect(language, layer)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in twig.parameters():
            parameter.data += noise * torch.randn_like(parameter)
    return twig.eval()


TWIGS = {
    "perfect": lambda language: perfect(language, 2),
    "nearly": lambda language: noisy(language, 1, 0.02),
    "short": lambda language: grown(language, 1, 1),
    "wrong": lambda language: noisy(language, 2, 0.3),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A base of five layers with each of the twigs, in both frameworks."""
    torch.manual_seed(1)
    base = VLM(VLMConfig(tiny.VISION, TEXT, image_token_id=tiny.IMAGE)).eval()
    for parameter in base.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    # Else it says its last word again and again: the output layer is the embedding.
    base.language.norm.weight.data = 3 * torch.randn(TEXT.hidden_size)
    folder = tiny.checkpoint(base, tmp_path_factory.mktemp("base"))
    pixels = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    found, answers = {}, {}
    for name, made in TWIGS.items():
        reference = VLM(base.config).eval()
        reference.load_state_dict(base.state_dict())
        reference.learned = {"twig": made(reference.language)}
        own = tmp_path_factory.mktemp(name) / "mlx"
        shutil.copytree(folder, own)
        tiny.write_learned(reference, own)
        model, _ = load(own, dtype="float32")
        found[name] = SimpleNamespace(
            ours=model, theirs=reference, pixels=pixels, folder=own, name=name, answers=answers
        )
    return found


def K_of(spec: str) -> int:
    return tiny.N if spec == "none" else K


def read(pair, spec: str, row=ROW, twig: TwigReader | None = None, chain=None, policy=None):
    """The prompt with its images."""
    pixels = mx.array(pair.pixels[: len(row.runs)]) if row.runs else None
    chain = chain or plan(spec, pair.ours.learned)
    return pair.ours([row], pixels, chain, K_of(spec), policy, twig=twig)


def once(pair, spec: str, *others: Any, answer: Callable[[], list[int]]) -> list[int]:
    """What the base answers without speculating, asked for once: the twig beside it has no say
    in it, unless it chooses what is kept."""
    key = (pair.name if "twig" in spec else None, spec, *others)
    if key not in pair.answers:
        pair.answers[key] = answer()
    return pair.answers[key]


def greedy(pair, spec: str, limit: int, row=ROW) -> list[int]:
    """A token at a time, as without a twig."""

    def answer() -> list[int]:
        before = read(pair, spec, row)
        token_11, place_11 = mx.argmax(before.logits_BLV[:, -1], -1, keepdims=True), before.next_B1
        said = [token_11.item()]
        for _ in range(LONGEST - 1):
            logits_1LV = before.step(token_11)
            token_11, place_11 = mx.argmax(logits_1LV[:, -1], -1, keepdims=True), place_11 + 1
            said.append(token_11.item())
        return said

    return once(pair, spec, tuple(row.ids), answer=answer)[:limit]


def begun(pair, spec: str, most=5, sure=0.6, ends=NO_END, row=ROW, chain=None, policy=None):
    """A speculation and the first token; its drafts are written down in `drafts`."""
    growth = TwigReader(pair.ours.learned["twig"])
    before = read(pair, spec, row, growth, chain, policy)
    turns = Speculation(before, growth, ends, most, sure)
    turns.drafts, draft = [], turns.draft

    def noted(*arguments):
        drafted, states = draft(*arguments)
        turns.drafts.append(drafted)
        return drafted, states

    turns.draft = noted  # of this instance
    return turns, int(mx.argmax(before.logits_BLV[0, -1]).item())


def spoken(turns: Speculation, first: int, limit: int) -> list:
    """The tokens up to the end, as the writer of an answer takes them."""
    said = []
    for token in turns.tokens(first, limit):
        said.append(token)
        if token.id in turns.ends:
            break
    return said


def cut(ids: list[int], ends) -> list[int]:
    return next((ids[: n + 1] for n, one in enumerate(ids) if one in ends), ids)


# Of how many tokens at most a draft is, from how sure a twig must be, and tokens of the answer:
# few where a twig that is wrong drafts all the rest again after every one.
DRAFTS = ((1, 0.6, 18), (5, 0.6, 18), (4, 0.0, 12), (40, 0.0, 8), (3, 1.1, 18))


# --- the answer -----------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", TWIGS)
def test_the_answer_is_that_of_greedy_decoding_token_for_token(pairs, name, spec):
    pair = pairs[name]
    for most, sure, limit in DRAFTS:
        turns, first = begun(pair, spec, most, sure)
        said = spoken(turns, first, limit)
        assert [token.id for token in said] == greedy(pair, spec, limit), (most, sure)
        assert said[-1].drafted == sum(map(len, turns.drafts))
        assert 0 <= said[-1].accepted <= said[-1].drafted
        assert all(1 <= len(draft) <= most for draft in turns.drafts[:-1])


@pytest.mark.parametrize("spec", ["none", "twig", "avgpool"])
@pytest.mark.parametrize("name", ["perfect", "nearly"])
def test_it_ends_where_greedy_decoding_ends_inside_a_draft_too(pairs, name, spec):
    pair, inside = pairs[name], 0
    whole = greedy(pair, spec, 24)
    for end in set(whole):
        turns, first = begun(pair, spec, 5, 0.0, ends={end})
        said = [token.id for token in spoken(turns, first, 24)]
        assert said == cut(whole, {end})
        assert all(end not in draft[:-1] for draft in turns.drafts)
        inside += any(end in draft for draft in turns.drafts)
    assert inside, "no draft held an end"


@pytest.mark.parametrize("spec", ["none", "twig"])
@pytest.mark.parametrize("name", TWIGS)
def test_it_stops_after_as_many_tokens_as_were_asked_for(pairs, name, spec):
    pair = pairs[name]
    whole = greedy(pair, spec, 13)
    for limit in range(1, 14):
        turns, first = begun(pair, spec, 5, 0.0)
        said = [token.id for token in spoken(turns, first, limit)]
        assert said == whole[:limit]
        if name == "perfect" and spec == "none":  # nothing is drafted that could not be said
            assert sum(map(len, turns.drafts)) + len(turns.drafts) == limit - 1


def test_a_prompt_without_images_and_several_images_are_answered_too(pairs):
    for text in ("how many stars ?", "# is there a star ?", "# and # ?"):
        row = tiny.row(text)
        for spec in ("none", "twig") if row.runs else ("none",):
            turns, first = begun(pairs["nearly"], spec, row=row)
            said = [token.id for token in spoken(turns, first, 12)]
            assert said == greedy(pairs["nearly"], spec, 12, row)


def test_a_twig_that_says_what_the_model_says_is_always_right(pairs):
    turns, first = begun(pairs["perfect"], "none", 5, 0.0)
    last = spoken(turns, first, 25)[-1]
    assert (last.drafted, last.accepted) == (20, 20)
    assert [len(draft) for draft in turns.drafts] == [5, 5, 5, 5]  # 24 tokens in 4 passes


def test_a_twig_that_knows_nothing_is_never_right(pairs):
    turns, first = begun(pairs["wrong"], "none", 5, 0.0)
    last = spoken(turns, first, 13)[-1]
    assert (last.drafted, last.accepted) == (5 * 7 + 4 + 3 + 2 + 1, 0)


# --- a turn ---------------------------------------------------------------------------


def test_a_draft_ends_behind_what_the_twig_is_not_sure_of_behind_an_end_and_when_full(pairs):
    def drafted(told, most=5):
        turns, first = begun(pairs["wrong"], "none", ends={9}, most=most)
        guesses = iter(told)
        turns.draft_token = lambda state, place: (turns.run_twig(state, place), next(guesses))[1]
        held = [layer.rows for layer in turns.reader.cache]
        draft, states = turns.draft(first, turns.prefill.next_B1, most)
        assert states.shape[1] == len(draft) + 1
        assert [layer.rows for layer in turns.reader.cache] == [n + len(draft) + 1 for n in held]
        return draft

    sure = [(3, 0.9), (4, 0.6), (5, 0.7), (6, 0.99), (7, 0.8), (8, 0.9)]
    assert drafted(sure) == [3, 4, 5, 6, 7]
    assert drafted(sure, most=0) == []
    assert drafted([(3, 0.9), (4, 0.59), (5, 0.9)]) == [3, 4]
    assert drafted([(3, 0.1)]) == [3]
    assert drafted([(3, 0.9), (9, 0.9), (5, 0.9)]) == [3, 9]


def test_what_agrees_is_counted_up_to_the_first_that_does_not():
    assert speculate.count_accepted([4, 5, 6], [4, 5, 6, 7]) == 3
    assert speculate.count_accepted([4, 5, 6], [4, 8, 6, 7]) == 1
    assert speculate.count_accepted([4], [5, 6]) == 0
    assert speculate.count_accepted([], [5]) == 0


# --- what caches hold -----------------------------------------------------------------


def check_caches(
    pair, spec: str, turns: Speculation, first: int, chain, limit: int, policy=None
) -> int:
    """After every turn: rows, places, biases, keys and values of all layers, the twig's too, are
    those of the same tokens read at once into empty caches. How many drafts were wrong."""
    said = []
    for token in turns.tokens(first, limit):
        said.append(token.id)
        if len(said) != 1 + token.accepted + len(turns.drafts):
            continue  # not the last of its turn
        chain.again = True
        whole = tiny.Prompt([*ROW.ids, *said[:-1]], ROW.runs)
        growth = TwigReader(pair.ours.learned["twig"])
        after = read(pair, spec, whole, growth, chain.pipeline, policy)
        held, expected = (
            [*t.cache, *g.cache] for t, g in ((turns.prefill, turns.reader), (after, growth))
        )
        assert [layer.rows for layer in held] == [layer.rows for layer in expected]
        for one, other in zip(held, expected, strict=True):
            places = (np.array(layer.positions_BS)[:, : layer.rows] for layer in (one, other))
            assert np.array_equal(*places)
            for part in ("keys_BGSd", "values_BGSd"):
                close(*(np.array(getattr(x, part)[:, :, : x.rows]) for x in (one, other)))
            assert (one.bias_BS is None) == (other.bias_BS is None)
            if one.bias_BS is not None:
                close(np.array(one.bias_BS), np.array(other.bias_BS))
        assert int(mx.argmax(after.logits_BLV[0, -1]).item()) == said[-1]
    assert len(said) == limit
    return token.drafted - token.accepted


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["nearly", "short", "wrong"])
def test_after_every_turn_caches_hold_what_a_recomputation_without_any_holds(pairs, name, spec):
    chain = Replaying(pairs[name], spec)
    turns, first = begun(pairs[name], spec, 4, 0.0, chain=chain.pipeline)
    assert check_caches(pairs[name], spec, turns, first, chain, 14) > 0


@pytest.mark.parametrize("spec", ["none", "twig", "fastv", "cls_attention"])
def test_so_they_do_where_positions_count_anew_and_room_is_made_inside_a_draft(
    pairs, spec, monkeypatch
):
    monkeypatch.setattr("mlx_vlm_prune.models.cache.STEP", 3)
    pair, chain = pairs["short"], Replaying(pairs["short"], spec)
    turns, first = begun(pair, spec, 4, 0.0, chain=chain.pipeline, policy="renumber")
    assert check_caches(pair, spec, turns, first, chain, 14, "renumber") > 0


@pytest.mark.parametrize("spec", ["none", "twig"])
def test_a_decoder_that_forgets_to_crop_is_found_out(pairs, spec):
    chain = Replaying(pairs["short"], spec)
    turns, first = begun(pairs["short"], spec, 4, 0.0, chain=chain.pipeline)
    turns.crop = lambda rows: None
    with pytest.raises(AssertionError):
        check_caches(pairs["short"], spec, turns, first, chain, 14)
    turns, first = begun(pairs["short"], spec, 4, 0.0)
    turns.crop = lambda rows: None
    said = [token.id for token in spoken(turns, first, 24)]
    assert said != greedy(pairs["short"], spec, 24)


def test_a_decoder_that_believes_every_draft_is_found_out(pairs, monkeypatch):
    monkeypatch.setattr(speculate, "count_accepted", lambda draft, said: len(draft))
    turns, first = begun(pairs["short"], "none", 4, 0.0)
    turns.verify = lambda states, place, verify=turns.verify: [
        *turns.drafts[-1], verify(states, place)[-1]
    ]  # fmt: skip
    said = [token.id for token in spoken(turns, first, 24)]
    assert said != greedy(pairs["short"], "none", 24)


@pytest.mark.parametrize("piece", [5, 2048])
@pytest.mark.parametrize("spec", ["none", "twig", "fastv", "cls_attention+restore"])
def test_reading_along_changes_nothing_that_the_model_reads(pairs, spec, piece, monkeypatch):
    monkeypatch.setattr("mlx_vlm_prune.models.decoder.PREFILL_STEP_SIZE", piece)
    pair = pairs["nearly"]
    growth = TwigReader(pair.ours.learned["twig"])
    alone, along = read(pair, spec), read(pair, spec, twig=growth)
    assert np.array(alone.logits_BLV).tobytes() == np.array(along.logits_BLV).tobytes()
    for one, other in zip(alone.cache, along.cache, strict=True):
        assert one.rows == other.rows
        assert np.array(one.keys_BGSd).tobytes() == np.array(other.keys_BGSd).tobytes()
    assert {layer.rows for layer in growth.cache} == {alone.cache[growth.twig.layer - 1].rows}


# --- the reference --------------------------------------------------------------------


def plainly(pair, spec: str, pixels, steps, policy: str, limit: int) -> list[int]:
    """The reference's own answer without a twig."""

    def answer() -> list[int]:
        spliced = pair.theirs.embed([ROW], pixels, steps, positions=policy)
        return pair.theirs.generate(*spliced, max_tokens=limit)[0]

    return once(pair, spec, policy, limit, answer=answer)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", TWIGS)
def test_the_reference_says_drafts_and_accepts_the_same(pairs, name, spec):
    pair = pairs[name]
    pixels = torch.from_numpy(pair.pixels.transpose(0, 3, 1, 2).copy())
    end = pair.theirs.eos_token_id
    for most, sure, policy, limit in ((5, 0.6, "keep", 18), (3, 0.0, "renumber", 12)):
        turns, first = begun(pair, spec, most, sure, ends={end}, policy=policy)
        said = spoken(turns, first, limit)
        steps = steps_of(pair, spec, K_of(spec))
        sizes = {"max_draft": most, "min_probability": sure, "max_tokens": limit}
        spliced = pair.theirs.embed([ROW], pixels, steps, positions=policy)
        answer = theirs(pair.theirs, *spliced, **sizes)
        assert answer.ids == [token.id for token in said if token.id != end]
        assert answer.drafts == turns.drafts
        assert sum(answer.accepted) == said[-1].accepted
        assert answer.ids == plainly(pair, spec, pixels, steps, policy, limit)


def test_the_reference_without_a_twig_says_so():
    model = tiny.reference()
    with pytest.raises(UserError, match="no twig"):
        theirs(model, *model.embed([tiny.row("how many ?")], None))
