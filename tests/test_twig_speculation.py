"""Promises of speculative decoding: the answer stays what it is, in the reference too."""

import pytest
import torch

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generation import speculation as speculation_module
from torch_ref.generation.speculation import speculate as reference_speculate

from . import tiny
from .test_model import steps_of
from .twig_pairs import (
    PROMPT,
    SPECS,
    TWIGS,
    K_of,
    answer_once,
    build_pairs,
    generated,
    greedy,
    start_speculation,
    up_to_end,
)

# (longest draft, probability below which a draft ends, tokens of the answer). The answer is short
# where a wrong twig drafts all the rest again after every token.
DRAFTS = ((1, 0.6, 18), (5, 0.6, 18), (4, 0.0, 12), (40, 0.0, 8), (3, 1.1, 18))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return build_pairs(tmp_path_factory.mktemp)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", TWIGS)
def test_the_answer_is_that_of_greedy_decoding_token_for_token(pairs, name, spec):
    pair = pairs[name]
    for max_draft, min_probability, limit in DRAFTS:
        speculation, first = start_speculation(pair, spec, max_draft, min_probability)
        tokens = generated(speculation, first, limit)
        assert [token.id for token in tokens] == greedy(pair, spec, limit), (
            max_draft,
            min_probability,
        )
        assert tokens[-1].drafted == sum(map(len, speculation.drafts))
        assert 0 <= tokens[-1].accepted <= tokens[-1].drafted
        assert all(1 <= len(draft) <= max_draft for draft in speculation.drafts[:-1])


@pytest.mark.parametrize("spec", ["none", "twig", "avgpool"])
@pytest.mark.parametrize("name", ["perfect", "nearly"])
def test_it_ends_where_greedy_decoding_ends_inside_a_draft_too(pairs, name, spec):
    pair, inside = pairs[name], 0
    whole = greedy(pair, spec, 24)
    for end in set(whole):
        speculation, first = start_speculation(pair, spec, 5, 0.0, ends={end})
        ids = [token.id for token in generated(speculation, first, 24)]
        assert ids == up_to_end(whole, {end})
        assert all(end not in draft[:-1] for draft in speculation.drafts)
        inside += any(end in draft for draft in speculation.drafts)
    assert inside, "no draft held an end"


@pytest.mark.parametrize("spec", ["none", "twig"])
@pytest.mark.parametrize("name", TWIGS)
def test_it_stops_after_as_many_tokens_as_were_asked_for(pairs, name, spec):
    pair = pairs[name]
    whole = greedy(pair, spec, 13)
    for limit in range(1, 14):
        speculation, first = start_speculation(pair, spec, 5, 0.0)
        ids = [token.id for token in generated(speculation, first, limit)]
        assert ids == whole[:limit]
        if name == "perfect" and spec == "none":  # nothing is drafted that could not be said
            assert sum(map(len, speculation.drafts)) + len(speculation.drafts) == limit - 1


def test_a_prompt_without_images_and_several_images_are_answered_too(pairs):
    for text in ("how many stars ?", "# is there a star ?", "# and # ?"):
        prompt = tiny.row(text)
        for spec in ("none", "twig") if prompt.runs else ("none",):
            speculation, first = start_speculation(pairs["nearly"], spec, prompt=prompt)
            ids = [token.id for token in generated(speculation, first, 12)]
            assert ids == greedy(pairs["nearly"], spec, 12, prompt)


def test_a_twig_that_says_what_the_model_says_is_always_right(pairs):
    speculation, first = start_speculation(pairs["perfect"], "none", 5, 0.0)
    last = generated(speculation, first, 25)[-1]
    assert (last.drafted, last.accepted) == (20, 20)
    assert [len(draft) for draft in speculation.drafts] == [5, 5, 5, 5]  # 24 tokens in 4 passes


def test_a_twig_that_knows_nothing_is_never_right(pairs):
    speculation, first = start_speculation(pairs["wrong"], "none", 5, 0.0)
    last = generated(speculation, first, 13)[-1]
    assert (last.drafted, last.accepted) == (5 * 7 + 4 + 3 + 2 + 1, 0)


def test_a_draft_ends_behind_what_the_twig_is_not_sure_of_behind_an_end_and_when_full(pairs):
    def drafted(guesses_and_odds, max_draft=5):
        speculation, first = start_speculation(
            pairs["wrong"], "none", ends={9}, max_draft=max_draft
        )
        guesses = iter(guesses_and_odds)
        speculation.draft_token = lambda state, place: (
            speculation.run_twig(state, place),
            next(guesses),
        )[1]
        rows_before = [layer.rows for layer in speculation.reader.cache]
        draft, states = speculation.draft(first, speculation.prefill.next_B1, max_draft)
        assert states.shape[1] == len(draft) + 1
        assert [layer.rows for layer in speculation.reader.cache] == [
            n + len(draft) + 1 for n in rows_before
        ]
        return draft

    sure = [(3, 0.9), (4, 0.6), (5, 0.7), (6, 0.99), (7, 0.8), (8, 0.9)]
    assert drafted(sure) == [3, 4, 5, 6, 7]
    assert drafted(sure, max_draft=0) == []
    assert drafted([(3, 0.9), (4, 0.59), (5, 0.9)]) == [3, 4]
    assert drafted([(3, 0.1)]) == [3]
    assert drafted([(3, 0.9), (9, 0.9), (5, 0.9)]) == [3, 9]


def test_what_agrees_is_counted_up_to_the_first_that_does_not():
    assert speculation_module.count_accepted([4, 5, 6], [4, 5, 6, 7]) == 3
    assert speculation_module.count_accepted([4, 5, 6], [4, 8, 6, 7]) == 1
    assert speculation_module.count_accepted([4], [5, 6]) == 0
    assert speculation_module.count_accepted([], [5]) == 0


def reference_greedy(pair, spec: str, pixels, steps, policy: str, limit: int) -> list[int]:
    """The reference's own answer without a twig."""

    def answer() -> list[int]:
        spliced = pair.theirs.embed([PROMPT], pixels, steps, positions=policy)
        return pair.theirs.generate(*spliced, max_tokens=limit)[0]

    return answer_once(pair, spec, policy, limit, answer=answer)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", TWIGS)
def test_the_reference_says_drafts_and_accepts_the_same(pairs, name, spec):
    pair = pairs[name]
    pixels = torch.from_numpy(pair.pixels.transpose(0, 3, 1, 2).copy())
    end = pair.theirs.eos_token_id
    for max_draft, min_probability, policy, limit in (
        (5, 0.6, "keep", 18),
        (3, 0.0, "renumber", 12),
    ):
        speculation, first = start_speculation(
            pair, spec, max_draft, min_probability, ends={end}, policy=policy
        )
        tokens = generated(speculation, first, limit)
        steps = steps_of(pair, spec, K_of(spec))
        sizes = {"max_draft": max_draft, "min_probability": min_probability, "max_tokens": limit}
        spliced = pair.theirs.embed([PROMPT], pixels, steps, positions=policy)
        answer = reference_speculate(pair.theirs, *spliced, **sizes)
        assert answer.ids == [token.id for token in tokens if token.id != end]
        assert answer.drafts == speculation.drafts
        assert sum(answer.accepted) == tokens[-1].accepted
        assert answer.ids == reference_greedy(pair, spec, pixels, steps, policy, limit)


def test_the_reference_without_a_twig_says_so():
    model = tiny.reference()
    with pytest.raises(UserError, match="no twig"):
        reference_speculate(model, *model.embed([tiny.row("how many ?")], None))
