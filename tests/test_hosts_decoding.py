"""Promises of decoding with mlx-vlm's loop: its options, samplers, and caches of few bits."""

import sys

import mlx.core as mx
import pytest

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.stream import explain_kv_bits_errors

from . import host_folders, host_models

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
QUESTION = "w7 w9"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return host_folders.desk(tmp_path_factory.mktemp("hosts"), ["llava", "qwen2_5_vl"])


@pytest.fixture(scope="module")
def loaded(home):
    return {name: load(home / name) for name in ("llava", "qwen2_5_vl")}


def test_sampling_with_one_seed_repeats_and_with_another_differs(loaded, home):
    options = dict(image=home / "a.png", temperature=50.0, top_p=0.99, max_tokens=12)
    model, processor = loaded["qwen2_5_vl"]
    first, again, other = (
        generate(model, processor, QUESTION, **options, seed=seed).token_ids for seed in (1, 1, 2)
    )
    assert first == again != other


def test_mlx_vlms_options_reach_mlx_vlm(loaded, home, monkeypatch):
    theirs = sys.modules["mlx_vlm.generate"]  # its package has a function of that name
    given, real = {}, theirs.stream_generate

    def record(*args, **options):
        given.update(options)
        return real(*args, **options)

    monkeypatch.setattr(theirs, "stream_generate", record)
    model, processor = loaded["qwen2_5_vl"]
    generate(
        model, processor, QUESTION, image=home / "a.png",
        host_options={"kv_bits": 8, "prefill_step_size": 3, "quantized_kv_start": 9999},
        temperature=0.5, top_p=0.9, seed=3, max_tokens=1,
    )  # fmt: skip
    named = ("kv_bits", "prefill_step_size", "quantized_kv_start", "temperature", "top_p", "seed")
    assert [given[name] for name in (*named, "max_tokens")] == [8, 3, 9999, 0.5, 0.9, 3, 1]


@pytest.mark.parametrize("pruner", ["none", "norm", "fastv"])
def test_a_sampler_and_logits_processors_reach_mlx_vlms_loop(loaded, home, pruner):
    model, processor = loaded["qwen2_5_vl"]
    options = dict(image=home / "a.png", pruner=pruner, keep_ratio=1.0, max_tokens=4)
    first, *_ = generate(model, processor, QUESTION, **options).token_ids
    shapes = []

    def ban(tokens_L, logits_1V):
        shapes.append((tokens_L.ndim, logits_1V.shape[0]))
        return mx.where(mx.arange(logits_1V.shape[1]) == first, -mx.inf, logits_1V)

    def likeliest(logprobs_1V):
        assert mx.exp(logprobs_1V).sum().item() == pytest.approx(1, abs=1e-4)
        return mx.argmax(logprobs_1V, axis=-1)

    banned = generate(
        model, processor, QUESTION, logits_processors=(ban,), sampler=likeliest, **options
    )
    assert first not in banned.token_ids and len(banned.token_ids) == 4
    assert set(shapes) == {(1, 1)}


@pytest.mark.parametrize("step_size", [None, 3])
@pytest.mark.parametrize("pruner", ["none", "norm", "fastv"])
def test_a_logits_processor_gets_the_whole_prompt_first(loaded, home, pruner, step_size):
    """As from mlx-lm's loop and ours, with every placeholder, so that penalties are the same."""
    model, processor = loaded["qwen2_5_vl"]
    options = dict(image=home / "a.png", max_tokens=3)
    host_options = {"prefill_step_size": step_size}
    full, given = generate(model, processor, QUESTION, **options), []

    def record(tokens_L, logits_1V):
        given.append(tokens_L.tolist())
        return logits_1V

    answer = generate(
        model, processor, QUESTION, pruner=pruner, keep_ratio=1.0 if pruner == "none" else 0.75,
        logits_processors=[record], host_options=host_options, **options,
    )  # fmt: skip
    prompt = given[0]
    assert len(prompt) == full.prompt_tokens
    for n, tokens in enumerate(given[:3]):
        assert tokens == prompt + answer.token_ids[:n]


@pytest.mark.parametrize("name", ["sampler", "logits_processors"])
def test_errors_of_a_users_function_are_not_blamed_on_the_cache(loaded, name):
    def broken(*arrays):
        raise ValueError("a mistake of the user's")

    option = {name: broken if name == "sampler" else [broken]}
    with pytest.raises(ValueError, match=r"^a mistake of the user's$"):
        generate(*loaded["llava"], QUESTION, host_options={"kv_bits": 8}, **option)


@pytest.mark.parametrize("name", ["sampler", "logits_processors"])
def test_a_users_function_that_returns_no_array_is_refused(loaded, name):
    option = {name: (lambda *_: 7) if name == "sampler" else [lambda *_: 7]}
    with pytest.raises(UserError, match=r"returned 7; it must be"):
        generate(*loaded["llava"], QUESTION, **option)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kv_bits": "4"}, "kv_bits is '4'; it must be a number"),
        ({"prefill_step_size": 2.5}, "prefill_step_size is 2.5; it must be a number"),
        ({"resize_shape": 112}, "resize_shape is 112; give one or two sides"),
    ],
)
def test_a_host_option_of_another_type_is_refused(loaded, options, sentence):
    with pytest.raises(UserError, match=sentence):
        generate(*loaded["llava"], QUESTION, host_options=options)


@pytest.mark.parametrize("pruner", ["norm", "fastv"])
def test_a_cache_of_few_bits_is_one_from_the_row_asked_for_on(loaded, home, monkeypatch, pruner):
    """Keys of 64 numbers, as the real models have; `held` is the kind of cache in every layer."""
    _, processor = loaded["llava"]
    model = host_models.llava(hidden_size=128, num_attention_heads=2, num_key_value_heads=1)
    real, held = type(model.language_model).__call__, set()

    def watched(self, *args, **arguments):
        done = real(self, *args, **arguments)
        held.update(type(getattr(one, "cache", one)).__name__ for one in arguments["cache"])
        return done

    monkeypatch.setattr(type(model.language_model), "__call__", watched)
    token_ids = {}
    for start in (0, 9999):
        answer = generate(
            model, processor, QUESTION, image=home / "a.png", pruner=pruner, keep_ratio=0.75,
            host_options={"kv_bits": 8, "quantized_kv_start": start}, max_tokens=4,
        )  # fmt: skip
        token_ids[start] = answer.token_ids
        assert ("QuantizedKVCache" in held) is (start == 0)
        held.clear()
    assert token_ids[0] == token_ids[9999]  # of eight bits these weights lose no choice


def test_a_cache_that_cannot_have_so_few_bits_ends_in_one_sentence():
    def pieces():
        yield "a piece"
        raise ValueError("[quantize] The last dimension\nmust be divisible by 64")

    explained = explain_kv_bits_errors(pieces(), 4)
    assert next(explained) == "a piece"
    with pytest.raises(UserError, match=r"kv_bits=4 cannot be had of this model: .* by 64"):
        next(explained)
    with pytest.raises(ValueError, match="quantize"):
        list(explain_kv_bits_errors(pieces(), None))


def test_the_hosts_options_are_refused_for_our_own_models(tmp_path):
    model, processor = load()
    with pytest.raises(UserError, match="are for mlx-vlm models"):
        generate(model, processor, "What does the sign say?", host_options={"kv_bits": 8})
