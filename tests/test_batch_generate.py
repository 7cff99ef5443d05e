"""Promises of `batch_generate`: each answer is the one that `generate` gives alone."""

import mlx.core as mx
import pytest

from mlx_vlm_prune import batch_generate, generate, load
from mlx_vlm_prune.checkpoints.errors import UserError

from . import host_folders
from .golden_requests import make_folder

FIGURES = (
    "text", "token_ids", "finish_reason", "generation_tokens", "prompt_tokens", "visual_tokens",
    "visual_tokens_kept", "kept_indices", "layers", "pruner", "positions",
)  # fmt: skip
PROMPTS = ["how many stars ?", "is it red ?", "what is left of <image> and <image> ?", "yes ?"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("batch"))


@pytest.fixture(scope="module")
def loaded(home):
    return load(home / "tiny", dtype="float32")


def images(home):
    """None, one, two, and one of each prompt."""
    a, b = home / "a.png", home / "b.png"
    return [None, a, [a, b], (b,)]


def check_alone(loaded, prompts, pictures, **options):
    """The answers of a batch, each compared with `generate`'s."""
    answers = batch_generate(*loaded, prompts, pictures, **options)
    for prompt, image, answer in zip(prompts, pictures, answers, strict=True):
        alone = generate(*loaded, prompt, image, **options)
        assert [getattr(answer, name) for name in FIGURES] == [
            getattr(alone, name) for name in FIGURES
        ]
        assert answer.ttft_ms.keys() == alone.ttft_ms.keys()
        assert len(answer.views) == len(alone.views) and answer.cache_bytes > 0
    return answers


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pruner": "avgpool", "keep_tokens": 9},
        {"pruner": "visionzip+pyramiddrop", "keep_ratio": 0.45},
        {"pruner": "fastv", "keep_ratio": 0.6, "positions": "renumber"},
        {"pruner": "norm", "keep_tokens": 7, "temperature": 30.0, "top_p": 0.8, "seed": 11},
    ],
    ids=lambda options: options.get("pruner", "none"),
)
def test_each_answer_is_that_of_generate_alone(loaded, home, options):
    answers = check_alone(loaded, PROMPTS, images(home), max_tokens=8, **options)
    assert len({tuple(answer.token_ids) for answer in answers}) > 1
    assert answers[2].overlay().size[0] > 224


def test_prompts_without_images_are_a_batch_too(loaded):
    check_alone(loaded, PROMPTS[:2], [None, None], max_tokens=4)
    assert batch_generate(*loaded, []) == []


def test_processors_and_samplers_get_one_row_at_a_time(loaded, home):
    def ban_first(tokens_L, logits_1V):
        assert tokens_L.ndim == 1 and logits_1V.shape[0] == 1
        return mx.where(mx.arange(logits_1V.shape[1]) == tokens_L[0], -mx.inf, logits_1V)

    def least(logprobs_1V):
        return mx.argmin(logprobs_1V, axis=-1)

    options = dict(logits_processors=[ban_first], sampler=least, max_tokens=4)
    check_alone(loaded, PROMPTS[:2], images(home)[:2], **options)


def test_a_fault_names_its_prompt(loaded, home):
    (home / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^prompt 2 of 3: .*broken\.png"):
        batch_generate(*loaded, ["a ?"] * 3, [home / "a.png", home / "broken.png", None])
    with pytest.raises(UserError, match=r"^prompt 3 of 3: an image is 7; give a path"):
        batch_generate(*loaded, ["a ?"] * 3, [None, None, 7])


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        (["is it red ?"], {}, "prompts is one string"),
        ([["a ?", "b ?"], [None]], {}, "prompts are 2 and images 1"),
        ([["a ?"], "a.png"], {}, "give a list"),
        ([["a ?"]], {"num_draft_tokens": 2}, "num_draft_tokens is for one prompt at a time"),
        ([["a ?"]], {"host_options": {"kv_bits": 4}}, "are for mlx-vlm models"),
        ([["a ?"]], {"max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_what_makes_no_batch_is_refused(loaded, arguments, options, sentence):
    with pytest.raises(UserError, match=sentence):
        batch_generate(*loaded, *arguments, **options)


def test_mlx_vlms_models_answer_one_after_another(tmp_path):
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
    loaded = load(host_folders.checkpoint("llava", tmp_path))
    host_folders.picture(tmp_path, "a.png", 40, 40)
    prompts, pictures = ["w7 w9", "w9"], [tmp_path / "a.png", None]
    check_alone(loaded, prompts, pictures, pruner="norm", keep_tokens=4, max_tokens=3)
    with pytest.raises(UserError, match=r"^prompt 2 of 2: .*nowhere\.png"):
        batch_generate(*loaded, prompts, [pictures[0], tmp_path / "nowhere.png"], max_tokens=1)
