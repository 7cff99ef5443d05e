"""Promises of an answer's tokens: a stream of small pieces, sampling, and the default budget."""

import mlx.core as mx
import pytest

from mlx_vlm_prune import generate, load, stream_generate
from mlx_vlm_prune.generate import main
from mlx_vlm_prune.generation.request import Request
from mlx_vlm_prune.generation.steps import PromptChooser
from mlx_vlm_prune.inputs import budget

from . import tiny
from .golden_requests import make_folder

QUESTION = "how many stars ?"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny model (`tiny`) and a picture."""
    return make_folder(tmp_path_factory.mktemp("decoding"))


def test_the_stream_is_the_answer_in_small_pieces_and_the_last_has_the_result(home):
    model, processor = load(home / "tiny")
    pieces = list(stream_generate(model, processor, QUESTION, image=home / "a.png", max_tokens=9))
    whole = generate(model, processor, QUESTION, image=home / "a.png", max_tokens=9)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert whole.text == processor.tokenizer.decode(whole.token_ids)
    assert [piece.generation_tokens for piece in pieces] == list(range(1, len(pieces) + 1))
    *early, last = pieces
    assert early and all((piece.finish_reason, piece.result) == (None, None) for piece in early)
    assert last.finish_reason == last.result.finish_reason in ("stop", "length")
    assert (last.result.text, last.result.token_ids) == (whole.text, whole.token_ids)
    assert last.prompt_tokens == whole.prompt_tokens > tiny.N
    for figure in ("prompt_tps", "generation_tokens", "generation_tps", "peak_memory"):
        assert getattr(last, figure) == getattr(last.result, figure) > 0


def test_sampling_with_one_seed_repeats_and_with_another_differs(home):
    model, processor = load(home / "tiny")
    options = dict(image=home / "a.png", temperature=100.0, max_tokens=12)
    first, again, other = (
        generate(model, processor, QUESTION, **options, seed=seed).token_ids for seed in (1, 1, 2)
    )
    assert first == again != other


def test_top_p_never_picks_from_outside_the_set():
    odds = mx.log(mx.array([[0.05, 0.5, 0.15, 0.3]]))

    def drawn(temperature: float, top_p: float, seed: int) -> int:
        request = Request("a", [], temperature=temperature, top_p=top_p, seed=seed)
        return PromptChooser(request, [1])(odds).item()

    for seed in range(50):
        assert drawn(1.0, 0.7, seed) in (1, 3)  # .5 alone is short of .7
    assert {drawn(1.0, 1.0, seed) for seed in range(80)} == {0, 1, 2, 3}
    assert drawn(0.0, 1.0, 0) == 1


def test_without_a_budget_a_note_names_the_flag(home, capsys):
    budget.default_keep_ratio.cache_clear()
    model, image = str(home / "tiny"), str(home / "a.png")
    main(["--model", model, "--image", image, "--prompt", QUESTION, "--pruner", "norm", "-m", "2"])
    written = capsys.readouterr()
    assert written.err == "note: norm has no budget and keeps --keep-ratio 0.5\n"
    assert "Visual tokens: 16 -> 8 (50.0% pruned)" in written.out
