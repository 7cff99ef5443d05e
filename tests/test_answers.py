"""An evaluation's parts: a batch gives the answers of single questions, and log-probabilities
equal those of a cache-free pass."""

from dataclasses import replace
from itertools import islice

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from PIL import Image

from mlx_vlm_prune import generate, load, stream_generate
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.evaluation.answers import (
    QuestionBatch,
    answer_batch,
    prepare_question,
    share_tower,
)
from mlx_vlm_prune.evaluation.budgeted_methods import budgeted_methods
from mlx_vlm_prune.evaluation.dequantize import dequantize_matrices
from mlx_vlm_prune.evaluation.question_set import QuestionSet, fingerprint
from mlx_vlm_prune.evaluation.questions import Question, format_of
from mlx_vlm_prune.evaluation.resume import AnsweredBatch, ResumeFile
from mlx_vlm_prune.generation.steps import likelihood
from mlx_vlm_prune.inputs.prompt import Prompt
from mlx_vlm_prune.models.cache import LayerCache
from mlx_vlm_prune.models.language.experts import ExpertLinear, QuantizedExpertLinear
from mlx_vlm_prune.models.language.minimind import ForwardPass
from mlx_vlm_prune.pruners import plan

from . import tiny

K, MAX_TOKENS = 12, 5
TEXTS = (
    "Is there a red star?", "What does the sign say?", "Where is the star?",
    "How many red shapes are there?", "Is there a red star?", "Read the sign.",
)  # fmt: skip
ANSWERS = ("yes", "a b c", "b2", "3", "no", "a")
METHODS = (
    "none", "random", "avgpool", "downsample", "tome", "pixelprune", "divprune", "cdpruner",
    "fastv", "pyramiddrop", "dart", "pact", "cls_attention+restore", "visionzip+fastv",
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny model with its processor, and six questions about three pictures."""
    folder = tmp_path_factory.mktemp("home")
    model, processor = load(tiny.checkpoint(tiny.reference(), folder))
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (70, 70, 3), dtype=np.uint8)) for _ in range(3)]
    questions = [
        Question(f"{n}", text, (right,), lambda image=images[n // 2]: image)
        for n, (text, right) in enumerate(zip(TEXTS, ANSWERS, strict=True))
    ]
    return model, processor, questions


def budget(model, spec: str) -> int:
    return model.N if spec == "none" else K


def batch_answers(home, spec: str, kept: int | None = None):
    """A method's answers to all six questions in one batch."""
    model, processor, _ = home
    pipeline = plan(spec)
    shared, tower = share_tower(model, [pipeline])
    batch = batch_of(home)
    tower.start(batch)
    ends = processor.tokenizer.eos_token_ids
    return answer_batch(shared, batch, pipeline, kept or budget(model, spec), ends, MAX_TOKENS)


def batch_of(home) -> QuestionBatch:
    model, processor, questions = home
    return QuestionBatch(model, [prepare_question(model, processor, q) for q in questions])


@pytest.mark.parametrize("spec", METHODS)
def test_a_batch_has_the_answers_that_generate_gives_one_question_at_a_time(home, spec):
    model, processor, questions = home
    kept = budget(model, spec)
    for question, ids in zip(questions, batch_answers(home, spec).ids, strict=True):
        image = question.image()
        pieces = stream_generate(model, processor, question.text, image, pruner=spec,
                                 keep_tokens=kept, max_tokens=MAX_TOKENS)  # fmt: skip
        assert list(pieces)[-1].result.token_ids == ids


@pytest.mark.parametrize("spec", ["none", "uniform", "avgpool", "tome", "divprune"])
def test_the_log_probability_is_that_of_reading_question_and_answer_without_a_cache(home, spec):
    model, processor, questions = home
    logprob_B = batch_answers(home, spec).logprob_B
    for question, logprob in zip(questions, logprob_B, strict=True):
        prepared = prepare_question(model, processor, question)
        right_ids = prepared.right_ids
        both = Prompt(prepared.prompt.ids + right_ids, prepared.prompt.runs)
        pixels = mx.array(prepared.pixels_IHW3)
        logits = model([both], pixels, plan(spec), budget(model, spec), last_only=False).logits_BLV
        logits_AV = np.array(logits)[0].astype(np.float64)[-len(right_ids) - 1 : -1]
        p_AV = np.exp(logits_AV) / np.exp(logits_AV).sum(axis=1, keepdims=True)
        by_hand = sum(np.log(p_AV[i, token]) for i, token in enumerate(right_ids))
        assert logprob == pytest.approx(by_hand, rel=1e-4)
        assert right_ids[-1] in processor.tokenizer.eos_token_ids


@pytest.mark.parametrize("spec", ["fastv", "pyramiddrop", "pact", "cls_attention+restore"])
def test_the_log_probability_is_that_of_one_token_after_another(home, spec):
    model, processor, questions = home
    logprob_B = batch_answers(home, spec).logprob_B
    for question, logprob in zip(questions, logprob_B, strict=True):
        prepared = prepare_question(model, processor, question)
        pixels = mx.array(prepared.pixels_IHW3)
        prefill = model([prepared.prompt], pixels, plan(spec), K)
        logits_BV, by_hand = prefill.logits_BLV[:, -1], 0.0
        for token in prepared.right_ids:
            by_hand += (logits_BV - mx.logsumexp(logits_BV))[0, token].item()
            logits_BV = prefill.step(mx.array([[token]]))[:, -1]
        assert logprob == pytest.approx(by_hand, rel=1e-4)


def test_with_all_tokens_every_method_is_full_bit_for_bit(home):
    full = batch_answers(home, "none")
    methods, refused = budgeted_methods(tiny.N, METHODS, [tiny.N], {})
    assert not refused and len(methods) == len(METHODS)
    for method in methods:
        answers = batch_answers(home, method.spec, tiny.N)
        assert answers.ids == full.ids
        assert (answers.logprob_B == full.logprob_B).all(), method.spec


def test_an_answer_ends_where_the_model_ends_it(home):
    model, _, questions = home
    batch = batch_of(home)
    endless = answer_batch(model, batch, plan("none"), model.N, (), MAX_TOKENS).ids
    assert [len(ids) for ids in endless] == [MAX_TOKENS] * len(questions)
    end = endless[0][2]
    cut = [ids[: ids.index(end)] if end in ids else ids for ids in endless]
    assert answer_batch(model, batch, plan("none"), model.N, (end,), MAX_TOKENS).ids == cut


def test_a_picture_that_questions_share_is_encoded_once_for_all_methods(home):
    model, *_ = home
    encoded = []

    def counting_tower(pixels, want, cuts=()):
        encoded.append(len(pixels))
        return model.tower(pixels, want, cuts)

    plans = [plan(spec) for spec in ("none", "norm", "cls_attention", "divprune", "tome")]
    shared, tower = share_tower(model, plans)
    tower.tower = counting_tower
    batch = batch_of(home)
    tower.start(batch)
    for pipeline in plans:
        answer_batch(shared, batch, pipeline, budget(model, pipeline.spec), (), 1)
    assert encoded == [3, 3]  # three pictures: for the four after the tower, and for tome
    assert type(model.tower) is not type(shared.tower)


def test_a_rewound_cache_holds_the_rows_before():
    rng = np.random.default_rng(0)
    rows = [mx.array(rng.normal(size=(2, 1, n, 4)).astype(np.float32)) for n in (5, 3, 2)]
    places = [mx.array([list(range(a, b))] * 2) for a, b in ((0, 5), (5, 8), (5, 7))]
    bias = mx.array(rng.normal(size=(2, 5)).astype(np.float32))
    cache, other = LayerCache(), LayerCache()
    for one in (cache, other):
        one.append(rows[0], rows[0], ForwardPass(places[0], None, (), bias))
    fork = cache.fork()
    cache.append(rows[1], rows[1], ForwardPass(places[1], None, ()))
    cache.rewind(5)
    for one in (other, cache, fork):
        one.append(rows[2], rows[2], ForwardPass(places[2], None, ()))
        assert mx.array_equal(one.keys, other.keys).item() and one.rows == 7
        assert mx.array_equal(one.positions_BS, other.positions_BS).item()
        assert mx.array_equal(one.bias_BS, other.bias_BS).item()
    with pytest.raises(AssertionError, match="cannot be rewound"):
        cache.rewind(8)


@pytest.mark.parametrize(("bits", "mode"), [(8, "affine"), (4, "affine"), (4, "mxfp4")])
def test_dequantized_matrices_compute_as_the_quantized_do(bits, mode):
    model, _ = load()
    group = 32 if mode == "mxfp4" else 64
    nn.quantize(model.language, group_size=group, bits=bits, mode=mode)
    prompt = Prompt(list(range(3, 30)), [])
    logits = [np.array(model([prompt], None, plan("none"), model.N).logits_BLV)]
    assert (
        dequantize_matrices(model)
        == sum(isinstance(m, nn.Linear) for m in model.language.modules()) + 1
    )
    assert not any(isinstance(m, nn.QuantizedLinear) for m in model.modules())
    logits.append(np.array(model([prompt], None, plan("none"), model.N).logits_BLV))
    np.testing.assert_allclose(*logits, rtol=1e-3, atol=1e-4 * abs(logits[0]).max())


def test_dequantized_experts_compute_as_the_quantized_do():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = ExpertLinear(3, 64, 32)
            self.experts.weight = mx.random.normal((3, 32, 64), key=mx.random.key(0))

    holder = Holder()
    nn.quantize(holder, group_size=64, bits=4)
    assert isinstance(holder.experts, QuantizedExpertLinear)
    x_R1D, expert_R = mx.random.normal((5, 1, 64), key=mx.random.key(1)), mx.array([0, 2, 1, 1, 0])
    few = np.array(holder.experts(x_R1D, expert_R))
    assert dequantize_matrices(holder) == 1 and isinstance(holder.experts, ExpertLinear)
    np.testing.assert_allclose(few, np.array(holder.experts(x_R1D, expert_R)), rtol=1e-3, atol=1e-3)


def test_log_probabilities_that_are_not_finite_are_refused(home):
    broken, _ = load()
    broken.language.norm.weight = broken.language.norm.weight * float("nan")
    right_BA, prompt = np.array([[3, 4]]), Prompt([3, 5, 6], [])
    prefill = broken([prompt], None, plan("none"), broken.N)
    with pytest.raises(UserError, match="NaN"):
        likelihood(prefill, right_BA)


def test_a_question_without_an_answer_is_asked_and_one_that_is_too_long_is_refused(home):
    model, processor, questions = home
    first, *_ = islice(questions, 1)
    prepared = prepare_question(model, processor, Question("1", first.text, (), first.image))
    assert prepared.right_ids == sorted(processor.tokenizer.eos_token_ids)[:1]
    with pytest.raises(UserError, match="reads up to 32768"):
        prepare_question(model, processor, Question("1", "star " * 40_000, ("a",), first.image))


@pytest.mark.parametrize("spec", ["none", "norm", "tome", "fastv", "cdpruner"])
def test_questions_about_several_images_are_asked_as_generate_asks_them(home, tmp_path, spec):
    """Beside a question about one image, in a batch; the second image is in two questions."""
    model, processor, questions = home
    pictures = [questions[n].image() for n in (0, 2, 4)]
    for n, image in enumerate(pictures):
        image.save(tmp_path / f"{n}.png")
    several = [
        Question("1", TEXTS[0], ("yes",), tmp_path / "0.png", more_images=(tmp_path / "1.png",)),
        Question("2", TEXTS[1], ("no",), tmp_path / "1.png"),
        Question("3", TEXTS[2], (), tmp_path / "2.png", more_images=(tmp_path / "1.png",) * 2),
    ]
    shared, tower = share_tower(model, [plan(spec)])
    batch = QuestionBatch(model, [prepare_question(model, processor, q) for q in several])
    tower.start(batch)
    assert (batch.sizes, len(batch.first_U)) == ([model.N] * 6, 3)
    kept, ends = budget(model, spec), processor.tokenizer.eos_token_ids
    ids = answer_batch(shared, batch, plan(spec), kept, ends, MAX_TOKENS).ids
    for question, answer in zip(several, ids, strict=True):
        result = generate(
            model, processor, question.text, image=[question.image, *question.more_images],
            pruner=spec, keep_tokens=kept, max_tokens=MAX_TOKENS,
        )  # fmt: skip
        without_end = [token for token in result.token_ids if token not in ends]
        assert answer == without_end


def picture() -> Image.Image:
    return Image.new("RGB", (8, 8))


def test_a_limit_completes_the_group_that_it_meets():
    questions = [Question(f"{n}", "?", ("a",), picture, "all", "" if n < 3 else f"g{n // 3}")
                 for n in range(9)]  # fmt: skip

    def count(limit: int) -> int:
        limited = QuestionSet("own", format_of("own"), lambda _: iter(questions), limit)
        return len(limited.load()[0])

    assert [count(n) for n in (1, 3, 4, 6, 7, 9, 20)] == [1, 3, 6, 6, 9, 9, 9]


def test_images_in_memory_become_digests_that_differ():
    def loaded(image: bytes):
        questions = [Question("1", "?", ("a",), image)]
        return QuestionSet("own", format_of("own"), lambda _: iter(questions)).load()[0]

    def with_more(image: bytes):
        questions = [Question("1", "?", ("a",), b"x", more_images=(image,))]
        return QuestionSet("own", format_of("own"), lambda _: iter(questions)).load()[0]

    one, other = with_more(b"y" * 10_000), with_more(b"z" * 10_000)
    assert len(one[0].more_images[0]) == 32 and fingerprint(one) != fingerprint(other)
    first, second = loaded(b"x" * 10_000), loaded(b"y" * 10_000)
    assert len(first[0].image) == 32
    assert fingerprint(first) != fingerprint(second)
    assert fingerprint(first) == fingerprint(loaded(b"x" * 10_000))


def test_saved_answers_are_read_back_as_they_were(tmp_path):
    line = AnsweredBatch(
        4, 0, [0, 1, 3], [[5, 7], [], [2]], [-0.1, -1 / 3, -2.0], 0.5, [16, 16, 16],
        ["question 2: bad"], drafts=[3, 2, 9, 0.25],
    )  # fmt: skip
    assert line.is_whole and not replace(line, refused="why").is_whole
    assert not replace(line, ids=[[5], [-1], [2]]).is_whole
    file = ResumeFile(tmp_path / "e.json", ["some settings"], AnsweredBatch)
    assert file.read(lambda line: True) == []
    file.append(line)
    file.append(line)
    assert file.read(lambda line: True) == [line, line]
    content = file.path.read_bytes()
    for cut in (1, 10, len(content) // 2 - 1):
        file.path.write_bytes(content[:-cut])
        assert file.read(lambda line: True) == [line]
        assert file.path.read_bytes() == content[: len(content) // 2]
    file.append(line)
    answers = iter([True, False])
    assert file.read(lambda line: next(answers)) == [line]
    assert file.path.read_bytes() == content[: len(content) // 2], "what does not go on is dropped"
    other = ResumeFile(tmp_path / "e.json", ["other settings"], AnsweredBatch)
    assert other.path != file.path
