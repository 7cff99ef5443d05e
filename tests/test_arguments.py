"""Promises of `generate` in Python: samplers, options for hosts, and what is refused."""

import re

import mlx.core as mx
import pytest

from mlx_vlm_prune import Chat, batch_generate, generate, load, stream_generate
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.planning.budgets import keep_within
from mlx_vlm_prune.scenes import compose


def test_of_images_the_wrong_one_is_named():
    with pytest.raises(UserError, match="an image is None; give a path"):
        generate(None, None, "Is there a red star?", image=["a.png", None])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("image", 3),
        ("keep_ratio", "0.5"),
        ("keep_ratio", True),
        ("keep_tokens", "x"),
        ("keep_tokens", True),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("sampler", 3),
        ("logits_processors", print),
        ("logits_processors", [3]),
        ("chat_template_config", 3),
        ("num_draft_tokens", "3"),
        ("num_draft_tokens", True),
        ("temperature", "x"),
        ("top_p", "x"),
        ("seed", 0.5),
    ],
)
def test_an_argument_of_another_type_is_refused_with_its_value(scenes, option, value):
    with pytest.raises(UserError, match=re.escape(f" is {value!r}; ")):
        generate(*scenes, "Is there a red star?", **{option: value})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (3, "host_options is 3; it must be a mapping of prefill_step_size, kv_bits"),
        ({"kv_bit": 4}, "host_options has no 'kv_bit'; there are prefill_step_size, kv_bits"),
    ],
)
def test_host_options_have_checked_names(options, sentence):
    with pytest.raises(UserError, match=sentence):
        generate(None, None, "Is there a red star?", host_options=options)


@pytest.mark.parametrize("option", [{"sampler": mx.argmax}, {"logits_processors": [max]}])
def test_drafts_are_refused_beside_a_sampler(option):
    with pytest.raises(UserError, match="leave out sampler and logits_processors"):
        generate(None, None, "Is there a red star?", num_draft_tokens=2, **option)


@pytest.fixture(scope="module")
def scenes():
    return load(dtype="float32")


QUESTION = "Is there a red star?"


def test_a_sampler_gets_log_probabilities_and_replaces_temperature(scenes):
    shown = []

    def least_likely(logprobs_1V):
        shown.append(logprobs_1V)
        return mx.argmin(logprobs_1V, axis=-1)

    answer = generate(*scenes, QUESTION, sampler=least_likely, temperature=9.0, max_tokens=3)
    assert len(shown) >= answer.generation_tokens > 0
    for logprobs_1V, token in zip(shown, answer.token_ids, strict=False):
        assert logprobs_1V.shape[0] == 1
        assert mx.exp(logprobs_1V).sum().item() == pytest.approx(1, abs=1e-5)
        assert mx.argmin(logprobs_1V).item() == token


def test_a_logits_processor_gets_the_tokens_so_far_and_changes_what_is_chosen(scenes):
    model, processor = scenes
    plain = generate(model, processor, QUESTION, max_tokens=4)
    lengths, banned = [], plain.token_ids[0]

    def ban(tokens_L, logits_1V):
        lengths.append(tokens_L.size)
        ids = mx.arange(logits_1V.shape[-1])
        return mx.where(ids == banned, -mx.inf, logits_1V)

    other = generate(model, processor, QUESTION, logits_processors=[ban], max_tokens=4)
    assert banned not in other.token_ids
    first = plain.prompt_tokens  # the last call is for a token ahead, which is not used
    assert lengths[:-1] == [first + n for n in range(other.generation_tokens)]


@pytest.mark.parametrize("wrong", [7, mx.array([1, 2])])
def test_a_sampler_that_returns_no_token_is_refused(scenes, wrong):
    with pytest.raises(UserError, match=r"the sampler returned .*; it must be one token id"):
        generate(*scenes, QUESTION, sampler=lambda logprobs_1V: wrong)


@pytest.mark.parametrize("wrong", [7, mx.zeros((1, 3))])
def test_a_processor_that_returns_no_logits_is_refused(scenes, wrong):
    processors = [lambda tokens_L, logits_1V: wrong]
    with pytest.raises(UserError, match=r"a logits processor returned .*; it must be logits of"):
        generate(*scenes, QUESTION, logits_processors=processors)


def test_a_logits_processor_gets_the_tokens_that_mlx_lm_gives_it(scenes):
    """The whole prompt first, then one more token a call."""
    llama = pytest.importorskip("mlx_lm.models.llama", reason="mlx-lm is not installed")
    from mlx_lm.generate import generate_step

    options = dict(hidden_size=16, num_hidden_layers=1, intermediate_size=16, rms_norm_eps=1e-5)
    shape = llama.ModelArgs("llama", num_attention_heads=2, vocab_size=9, **options)
    given = []

    def record(tokens_L, logits_1V):
        given.append(tokens_L.tolist())
        return logits_1V

    prompt = [5, 6, 7]
    theirs = generate_step(
        mx.array(prompt), llama.Model(shape), max_tokens=2, logits_processors=[record]
    )
    answer = [token for token, _ in theirs]
    assert given[:2] == [prompt, prompt + answer[:1]]
    given.clear()
    answer = generate(*scenes, QUESTION, logits_processors=[record], max_tokens=2)
    first, second, *_ = given
    assert len(first) == answer.prompt_tokens and second == first + answer.token_ids[:1]


def test_mlx_lms_samplers_and_processors_are_taken(scenes):
    sample_utils = pytest.importorskip("mlx_lm.sample_utils", reason="mlx-lm is not installed")
    processors = sample_utils.make_logits_processors(repetition_penalty=1.3)
    sampler = sample_utils.make_sampler(temp=0.7, top_p=0.9)
    answer = generate(
        *scenes, QUESTION, sampler=sampler, logits_processors=processors, max_tokens=3
    )
    assert answer.generation_tokens > 0


@pytest.mark.parametrize("prompt", [None, 3, ["Is it red?"], b"Is it red?", {"role": "user"}])
def test_a_prompt_that_is_no_text_is_refused_with_its_value(scenes, prompt):
    image, sentence = compose(1).image(), re.escape(f"prompt is {prompt!r}; it must be a str")
    for ask in (
        lambda: generate(*scenes, prompt),
        lambda: generate(*scenes, prompt, image),
        lambda: next(stream_generate(*scenes, prompt, image, pruner="divprune")),
        lambda: batch_generate(*scenes, [QUESTION, prompt]),
        lambda: Chat(*scenes).ask(prompt, image),
        lambda: keep_within(*scenes, prompt, image, pruner="norm", ms=50),
    ):
        with pytest.raises(UserError, match=sentence):
            ask()


@pytest.mark.parametrize("prompts", [None, 3, "Is it red?"])
def test_prompts_that_are_no_list_are_refused(scenes, prompts):
    with pytest.raises(UserError, match=r"^prompts is .*; give a list of prompts"):
        batch_generate(*scenes, prompts)
    with pytest.raises(UserError, match=r"^images is .*; give a list with an entry for each"):
        batch_generate(*scenes, [QUESTION], 3)


def test_an_option_that_a_batch_does_not_have_is_named(scenes):
    with pytest.raises(TypeError, match=r"batch_generate\(\) got an unexpected argument 'verbose'"):
        batch_generate(*scenes, ["Is there a red star?"], verbose=True)
