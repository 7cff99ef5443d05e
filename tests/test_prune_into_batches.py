"""Promises of `prune-into` folders in mlx-vlm's batch engine, and between turns and requests.

Each prompt answers as by itself on our own path, which `test_hosts` checks.
"""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_prune import generate
from mlx_vlm_prune import load as load_ours
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.prepared_inputs import PreparedInputs
from mlx_vlm_prune.hosts.pruned_folder import prune_into

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
from . import host_folders
from .host_models import IMAGE, KINDS
from .host_reference import QWEN, stock
from .into_folders import (
    Answer,
    as_processor_gives,
    checkpoint,
    fastvlm_sizes,
    inputs_of,
    max_images,
    ours,
    video,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
UNEQUAL = ["llava", "gemma3", "idefics3", "smolvlm", "internvl_chat", "pixtral", *QWEN]
TURNS = ["llava", "qwen2_5_vl", "qwen3_vl"]
RATIO = 0.4
TOKENS = 5


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    for kind in KINDS:
        prune_into(checkpoint(kind, folder), folder / f"{kind}-pruned", "divprune", RATIO, None)
    return folder


@pytest.fixture(scope="module")
def load(home):
    """A folder's model, as mlx-vlm loads it."""
    from mlx_vlm.utils import load_model

    with fastvlm_sizes():
        yield lambda name: load_model(home / name)


class Endless:
    """A tokenizer to whom no token is the last."""

    def __init__(self):
        self.stopping_criteria = self

    def add_eos_token_ids(self, ids) -> None: ...
    def __call__(self, token: int) -> bool:
        return False


def engine(model: Any, **options: Any) -> Any:
    from mlx_vlm.generate.ar import BatchGenerator

    return BatchGenerator(model.language_model, Endless(), max_tokens=TOKENS, **options)


def queue(batch: Any, model: Any, inputs: PreparedInputs) -> int:
    """As mlx-vlm's server does."""
    from mlx_vlm.apc import semantic_extra_hash

    arguments = embedded(model, inputs)
    arguments["_apc_semantic_hash"] = semantic_extra_hash(image_hash=1, model=model.language_model)
    (uid,) = batch.insert([inputs.ids], prompt_kwargs=[arguments])
    return uid


def embedded(model: Any, inputs: PreparedInputs) -> dict[str, Any]:
    """A prompt's embeddings, and all else that is handed on with them."""
    inputs = as_processor_gives(model.config.model_type, inputs)
    ids, extra = mx.array(inputs.ids)[None], inputs.extra
    features = model.get_input_embeddings(ids, inputs.pixels, mask=inputs.mask_1L, **extra)
    return {**extra, **{k: x for k, x in features.to_dict().items() if x is not None}}


def read(batch: Any, answers: dict[int, list[tuple[int, float]]], steps: int | None = None) -> None:
    """Go on by so many steps, or to the end."""
    while batch.has_work and steps != 0:
        for piece in batch.next()[1]:
            answers.setdefault(piece.uid, []).append((piece.token, piece.token_logprob))
        steps = None if steps is None else steps - 1


def together(
    model: Any, prompts: list[PreparedInputs], **options: Any
) -> list[list[tuple[int, float]]]:
    """Tokens and log probabilities of each prompt, all read at once."""
    batch, answers = engine(model, **options), dict[int, list[tuple[int, float]]]()
    uids = [queue(batch, model, inputs) for inputs in prompts]
    read(batch, answers)
    batch.close()
    return [answers[uid] for uid in uids]


def alone(model: Any, inputs: PreparedInputs, spec: str = "divprune") -> Answer:
    """What our own path answers, with the stock model."""
    extra = dict(inputs.extra)
    if "pixel_values_videos" in extra:
        inputs = replace(inputs, pixels=extra.pop("pixel_values_videos"), extra=extra)
    if inputs.pixels is not None:
        return ours(model, inputs, spec, RATIO, None)
    return stock(model, inputs)


def assert_same(answer: list[tuple[int, float]], expected: Answer) -> None:
    tokens, odds_TV = expected
    assert [token for token, _ in answer] == tokens[:TOKENS]
    wanted = odds_TV[np.arange(len(answer)), tokens[: len(answer)]]
    np.testing.assert_allclose([odds for _, odds in answer], wanted, rtol=0, atol=1e-4)


def words(*ids: int) -> PreparedInputs:
    return PreparedInputs(list(ids), mx.ones((1, len(ids)), mx.int32))


def longer(inputs: PreparedInputs) -> PreparedInputs:
    ids = [*inputs.ids, 7, 11]
    return replace(inputs, ids=ids, mask_1L=mx.ones((1, len(ids)), mx.int32))


def prompts_of(kind: str, model: Any) -> list[PreparedInputs]:
    """One with an image, one of words, one with all images: none as long as another."""
    one, several = inputs_of(kind, model, 1), inputs_of(kind, model, max_images(kind))
    return [one, words(7, 3, 5, 11), several if max_images(kind) > 1 else longer(one)]


@pytest.mark.parametrize("step", [1, 3, 2048])
@pytest.mark.parametrize("kind", UNEQUAL)
def test_prompts_read_at_once_answer_as_alone_pruned_or_not(load, kind, step):
    whole = load(kind)
    prompts = prompts_of(kind, whole)
    answers = together(load(f"{kind}-pruned"), prompts, prefill_step_size=step)
    for answer, inputs in zip(answers, prompts, strict=True):
        assert_same(answer, alone(whole, inputs))


@pytest.mark.parametrize("kind", UNEQUAL)
def test_a_prompt_that_joins_another_answers_as_alone(load, kind):
    whole, model = load(kind), load(f"{kind}-pruned")
    batch, answers, prompts = engine(model), {}, prompts_of(kind, whole)
    uids = []
    for inputs in reversed(prompts):
        assert not uids or 0 < len(answers[uids[0]]) < TOKENS  # the first is still going on
        uids.append(queue(batch, model, inputs))
        read(batch, answers, 3 if len(uids) == 1 else 1)
    read(batch, answers)
    batch.close()
    for uid, inputs in zip(uids, reversed(prompts), strict=True):
        assert_same(answers[uid], alone(whole, inputs))


@pytest.mark.parametrize("kind", ["llava", *QWEN])
def test_so_do_prompts_pruned_by_what_the_tower_attends_to(home, load, kind):
    name = f"{kind}-attended"
    prune_into(home / kind, home / name, "received_attention", RATIO, None)
    whole = load(kind)
    prompts = prompts_of(kind, whole)
    for answer, inputs in zip(together(load(name), prompts), prompts, strict=True):
        assert_same(answer, alone(whole, inputs, "received_attention"))


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_a_cache_that_does_not_hear_of_the_rows_that_are_gone_would_not_pass(
    load, kind, monkeypatch
):
    from mlx_vlm.models.cache import BatchKVCache

    whole, model = load(kind), load(f"{kind}-pruned")
    prompts = prompts_of(kind, whole)
    monkeypatch.setattr(BatchKVCache, "prepare", lambda self, **_: None)
    with pytest.raises(AssertionError, match=r"Not equal to tolerance|assert"):
        for answer, inputs in zip(together(model, prompts), prompts, strict=True):
            assert_same(answer, alone(whole, inputs))


def test_what_forgets_to_pass_over_rows_gets_nan_and_no_answer(load):
    from mlx_vlm.models.llava import LanguageModel

    model, inputs = load("llava-pruned"), inputs_of("llava", load("llava"), 1)
    ids = mx.array(inputs.ids)[None]
    x_1LD = model.get_input_embeddings(ids, inputs.pixels, mask=inputs.mask_1L).inputs_embeds
    out = LanguageModel.__call__(model.language_model, ids, inputs_embeds=x_1LD)
    assert np.isnan(np.array(out.logits[0, -1])).all()


@pytest.mark.parametrize("kind", UNEQUAL)
def test_the_nan_of_an_image_reaches_its_own_answer_and_no_other(load, kind):
    """Of a tower it is refused; here an embedding that is left is NaN, as of a broken projector."""
    from mlx_vlm.models.cache import make_prompt_cache

    whole, model = load(kind), load(f"{kind}-pruned")
    one, text, _ = prompts_of(kind, whole)
    dark = replace(one, pixels=mx.full(one.pixels.shape, mx.nan, one.pixels.dtype))
    with pytest.raises(UserError, match="the vision tower gave NaN"):
        embedded(model, dark)
    arguments, text_arguments = embedded(model, one), embedded(model, text)
    x_1LD, visual_L = mx.array(arguments["inputs_embeds"]), np.array(one.ids) == IMAGE
    there = np.flatnonzero(visual_L & ~np.isnan(np.array(x_1LD[0, :, 0])))
    assert 0 < len(there) < visual_L.sum()
    x_1LD[0, int(there[0])] = mx.nan
    arguments["inputs_embeds"] = x_1LD
    cache = make_prompt_cache(model.language_model)
    out = model.language_model(mx.array(one.ids)[None], **arguments, cache=cache)
    assert np.isnan(np.array(out.logits[0, -1])).all()
    batch, answers = engine(model), dict[int, list[tuple[int, float]]]()
    uids = batch.insert([one.ids, text.ids], prompt_kwargs=[arguments, text_arguments])
    read(batch, answers)
    batch.close()
    assert np.isnan([odds for _, odds in answers[uids[0]]]).all()
    assert_same(answers[uids[1]], alone(whole, text))


@pytest.mark.parametrize("kind", QWEN)
def test_a_pruned_clip_shares_a_batch_with_a_pruned_image(load, kind):
    whole, model = load(kind), load(f"{kind}-pruned")
    prompts = [inputs_of(kind, whole, 1), video(), words(7, 3, 5, 11)]
    for answer, inputs in zip(together(model, prompts), prompts, strict=True):
        assert_same(answer, alone(whole, inputs))


@pytest.mark.parametrize("kind", ["fastvlm", "llava_next", "paligemma"])
def test_other_prompts_share_a_batch_when_those_of_the_whole_model_can(load, kind):
    """Of equal length; mlx-vlm reads PaliGemma's otherwise in its engine than alone, whole too."""
    inputs = inputs_of(kind, load(kind), 1)
    for name in (kind, f"{kind}-pruned"):
        model = load(name)
        (expected,) = together(model, [inputs])
        for answer in together(model, [inputs] * 2):
            assert [token for token, _ in answer] == [token for token, _ in expected]
            wanted = [odds for _, odds in expected]
            np.testing.assert_allclose([odds for _, odds in answer], wanted, rtol=0, atol=1e-4)
        if kind == "paligemma":
            with pytest.raises(ValueError, match=r"dimensions must match|only when equally long"):
                together(model, [inputs, longer(inputs)])


@pytest.mark.parametrize("kind", ["llava", "pixtral"])
def test_the_servers_prefix_cache_finds_no_prompt_of_fewer_rows_again(load, kind):
    from mlx_vlm.apc import APCManager

    inputs, hits = inputs_of(kind, load(kind), 1), {}
    for name in (kind, f"{kind}-pruned"):
        model, manager = load(name), APCManager(num_blocks=64, block_size=4)
        first, again = (together(model, [inputs], apc_manager=manager) for _ in range(2))
        np.testing.assert_allclose(again, first, rtol=0, atol=1e-4)
        hits[name] = manager.stats.hits
    assert hits == {kind: 1, f"{kind}-pruned": 0}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Folders with a tokenizer."""
    folder = host_folders.desk(tmp_path_factory.mktemp("turns"), TURNS)
    for kind in TURNS:
        prune_into(folder / kind, folder / f"{kind}-pruned", "divprune", RATIO, None)
        prune_into(folder / kind, folder / f"{kind}-attended", "received_attention", RATIO, None)
    return folder


def turn(model: Any, processor: Any, inputs: PreparedInputs, **options: Any) -> tuple[Answer, int]:
    """Tokens and log probabilities (T, V), and how many of the prompt's tokens were cached."""
    from mlx_vlm import stream_generate

    *pieces, last = stream_generate(
        model, processor, "", input_ids=mx.array(inputs.ids)[None], pixel_values=inputs.pixels,
        mask=inputs.mask_1L, max_tokens=TOKENS, temperature=0.0, **inputs.extra, **options,
    )  # fmt: skip
    odds_TV = np.stack([np.array(piece.logprobs) for piece in pieces])
    return (last.token_ids[: len(pieces)], odds_TV), last.cached_tokens


@pytest.mark.parametrize("file", ["pruned", "attended"])
@pytest.mark.parametrize("kind", TURNS)
def test_a_turn_that_could_go_on_from_the_last_ones_cache_answers_as_a_fresh_one(desk, kind, file):
    """The second repeats the first with its answer, the third goes another way in between."""
    from mlx_vlm.generate import PromptCacheState
    from mlx_vlm.utils import load_model

    _, processor = load_ours(desk / kind)
    cached = {}
    for name in (kind, f"{kind}-{file}"):
        model, state, cached[name] = load_model(desk / name), PromptCacheState(), 0
        first = KINDS[kind].inputs(model, 1)
        (tokens, _), _ = turn(model, processor, first, prompt_cache_state=state)
        for more in ([*tokens, 7, 11], [*tokens[:2], 30, 12, 9, 4, 4]):
            ids = [*first.ids, *more]
            inputs = replace(first, ids=ids, mask_1L=mx.ones((1, len(ids)), mx.int32))
            fresh, _ = turn(model, processor, inputs)
            answer, cached_tokens = turn(model, processor, inputs, prompt_cache_state=state)
            assert answer[0] == fresh[0]
            np.testing.assert_allclose(answer[1], fresh[1], rtol=0, atol=1e-4)
            cached[name] += cached_tokens
    assert cached[kind] > 0 == cached[f"{kind}-{file}"]  # a whole model's rows are read again


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_mlx_vlms_batch_generate_prunes(desk, kind):
    from mlx_vlm import load as load_theirs
    from mlx_vlm.generate import batch_generate

    images = [str(desk / f"{letter}.png") for letter in "aba"]  # two of a shape share a batch
    questions, options = ["w7 w9", "w3", "w4 w5 w6", "w8"], {"max_tokens": TOKENS}
    whole, model = load_ours(desk / kind), load_theirs(str(desk / f"{kind}-pruned"))
    expected = [
        generate(*whole, question, image, pruner="divprune", keep_ratio=RATIO, **options).text
        for question, image in zip(questions, [*images, None], strict=True)
    ]
    answers = batch_generate(*model, images=images, prompts=questions, **options)
    assert [text.strip() for text in answers.texts] == [text.strip() for text in expected]
    report = model[0].pruning_report
    assert len(report.prompts) == 3 and report.kept < report.total
