"""Promises of mlx-vlm's models: sampling, ends and system messages as mlx-vlm has them."""

from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_vlm_prune import Chat, generate, load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.prompt import prepare_prompt

from . import host_folders

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
QUESTION = "w7 w9"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return host_folders.desk(tmp_path_factory.mktemp("hosts"), ["qwen2_5_vl"])


@pytest.fixture(scope="module")
def loaded(home):
    return load(home / "qwen2_5_vl")


@pytest.fixture(scope="module")
def theirs(loaded, home):
    """mlx-vlm's own answer, as its command gives it."""

    def answer(prompt=QUESTION, **options):
        from mlx_vlm import stream_generate
        from mlx_vlm.prompt_utils import apply_chat_template

        model, processor = loaded
        text = apply_chat_template(processor, model.config, prompt, num_images=1)
        pieces = stream_generate(model, processor, text, image=[str(home / "a.png")], **options)
        return [piece.token for piece in pieces if piece.finish_reason is None]

    return answer


@pytest.mark.parametrize("options", [{"top_k": 5}, {"min_p": 0.3}, {"top_k": 9, "top_p": 0.9}])
def test_words_are_drawn_as_mlx_vlms_command_draws_them(loaded, home, theirs, options):
    mx.random.seed(3)
    expected = theirs(temperature=20.0, max_tokens=6, **options)
    ours = generate(
        *loaded, QUESTION, image=home / "a.png", temperature=20.0, max_tokens=6, seed=3, **options
    )
    assert ours.token_ids == expected
    assert generate(
        *loaded, QUESTION, image=home / "a.png", temperature=20.0, max_tokens=6, seed=4, **options
    ).token_ids != expected  # fmt: skip


def test_a_penalty_reads_the_whole_prompt_and_the_answer(loaded, home):
    from mlx_vlm.sample_utils import make_logits_processors

    options, penalty = dict(image=home / "a.png", max_tokens=6), dict(repetition_penalty=2.5)
    plain = generate(*loaded, QUESTION, **options)
    ours = generate(*loaded, QUESTION, **penalty, **options)
    given = generate(
        *loaded, QUESTION, logits_processors=make_logits_processors(**penalty), **options
    )
    assert ours.token_ids == given.token_ids != plain.token_ids


def test_a_further_token_ends_this_answer_alone(loaded, home):
    options = dict(image=home / "a.png", max_tokens=6, temperature=20.0, seed=1)
    whole = generate(*loaded, QUESTION, **options)
    n, end = next(
        (n, e) for n, e in enumerate(whole.token_ids) if n and e not in whole.token_ids[:n]
    )
    cut = generate(*loaded, QUESTION, eos_tokens=[end], **options)
    assert (cut.token_ids, cut.finish_reason) == (whole.token_ids[:n], "stop")
    assert generate(*loaded, QUESTION, **options).token_ids == whole.token_ids
    with pytest.raises(UserError, match="no single token of this qwen2_5_vl model's tokenizer"):
        Chat(*loaded, eos_tokens=["no such token"])


def test_a_system_message_is_where_mlx_vlms_command_puts_it(loaded, home, theirs):
    messages = [{"role": "system", "content": "w3 w4"}, QUESTION]
    expected = theirs(messages, max_tokens=6)
    options = dict(image=home / "a.png", max_tokens=6)
    ours = generate(*loaded, QUESTION, system="w3 w4", **options)
    assert ours.token_ids == expected
    longer = generate(*loaded, QUESTION, **options).prompt_tokens
    assert ours.prompt_tokens >= longer + 2
    chat = Chat(*loaded, system="w3 w4", max_tokens=6)
    assert chat.ask(QUESTION, home / "a.png").token_ids == expected
    assert chat.ask("w9").prompt_tokens > ours.prompt_tokens


def test_a_model_of_one_question_has_no_system_message():
    config = {"model_type": "paligemma"}
    host = SimpleNamespace(kind="paligemma", model=SimpleNamespace(config=config), processor=None)
    host.image_marks, host.template_config = (), lambda images: (config, images)
    with pytest.raises(UserError, match="paligemma model reads one question and no system message"):
        prepare_prompt(host, QUESTION, [], system="w3")
