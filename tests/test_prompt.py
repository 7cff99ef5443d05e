"""Promises of the prompt: the ids are transformers' own, and every image is where it was put."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.inputs.detokenizer import INCOMPLETE, Detokenizer
from mlx_vlm_prune.inputs.prompt import Prompt, Tokenizer, tokenize_prompt
from mlx_vlm_prune.scenes.vocabulary import write

N = 7
TEXTS = [
    "What is this?",
    "仔细看一下这张图：描述一下这个图像的内容。",
    "Mail me@example.com, @@@ or 🐼‍❄️ ☃︎",
    "  two  spaces \n\n and\ttabs ",
    "<|im_end|> is not mine to say",
    "",
]


@pytest.fixture(scope="session", params=["minimind2", "minimind3"])
def folder(request, shared_data):
    return shared_data / request.param


@pytest.fixture(scope="session")
def minimind(shared_data):
    return Tokenizer.from_folder(shared_data / "minimind2")


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """The scenes tokenizer, which is always there."""
    place = tmp_path_factory.mktemp("words")
    write(place)
    return place


def theirs(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_equal_those_of_transformers(folder, text):
    ours, reference = Tokenizer.from_folder(folder), theirs(folder)
    assert ours.encode(text) == reference.encode(text, add_special_tokens=False)
    ids = ours.encode(text)
    assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", TEXTS)
def test_the_chat_template_gives_what_transformers_gives(folder, text):
    messages = [{"role": "user", "content": text}]
    ours = Tokenizer.from_folder(folder).render(messages)
    assert ours == theirs(folder).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("options", [{}, {"open_thinking": True}, {"enable_thinking": False}])
def test_thinking_is_asked_for_and_written_as_transformers_does(folder, options):
    """Several turns, with and without thoughts; the template's options reach it."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "No.", "reasoning_content": "well"},
        {"role": "user", "content": "Three?"},
    ]
    ours, reference = Tokenizer.from_folder(folder), theirs(folder)
    for turns in (messages, messages[:2], messages[1:3]):
        for asks in (True, False):
            expected = reference.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=asks, **options
            )
            assert ours.render(turns, add_generation_prompt=asks, **options) == expected
    prompt = tokenize_prompt(ours, "Three?", [], "@", options=options)
    expected = reference.apply_chat_template(
        messages[-1:], tokenize=False, add_generation_prompt=True, **options
    )
    assert prompt.ids == reference.encode(expected, add_special_tokens=False)


def test_minimind3_thinks_only_when_it_is_asked_to(shared_data):
    messages = [{"role": "user", "content": "What?"}]
    tokenizer = Tokenizer.from_folder(shared_data / "minimind3")
    assert tokenizer.render(messages).endswith("<think>\n\n</think>\n\n")
    assert tokenizer.render(messages, open_thinking=True).endswith("<think>\n")


@pytest.mark.parametrize("K", [1, 16, 64])
def test_an_image_of_minimind3_is_k_pads(shared_data, K):
    tokenizer = Tokenizer.from_folder(shared_data / "minimind3")
    prompt = tokenize_prompt(tokenizer, "What?", [K], "<|image_pad|>")
    [(start, length)] = prompt.runs
    assert length == K and prompt.ids[start : start + K] == [12] * K
    assert prompt.ids.count(12) == K


@pytest.mark.parametrize("text", ["<image>{}", "{}<image>", "a <image> b {}", "{}"])
@pytest.mark.parametrize("mark", TEXTS)
def test_a_prompt_with_an_image_is_the_whole_text_encoded_at_once(folder, text, mark):
    """As MiniMind-V does it: the mark becomes N placeholders, then everything is tokenized."""
    reference, text = theirs(folder), text.format(mark)
    marked = text if "<image>" in text else "<image>\n" + text
    messages = [{"role": "user", "content": marked.replace("<image>", "@" * N)}]
    whole = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenize_prompt(Tokenizer.from_folder(folder), text, [N], "@")
    assert prompt.ids == reference.encode(whole, add_special_tokens=False)


def test_the_users_own_at_signs_beside_an_image_are_not_the_image(minimind):
    prompt = tokenize_prompt(minimind, "@@<image>@ and @", [N], "@")
    [(start, length)] = prompt.runs
    at = minimind.token_id("@")
    assert length == N
    assert prompt.ids[start - 2 : start + N + 1] == [at] * (N + 3)
    assert minimind.decode(prompt.ids[start + N :]).startswith("@ and @")


def test_several_images_stand_where_their_marks_are_each_with_its_own_size(minimind):
    prompt = tokenize_prompt(minimind, "first <image> then <image>, or <image>?", [3, 5, 2], "@")
    at = minimind.token_id("@")
    assert [length for _, length in prompt.runs] == [3, 5, 2]
    for start, length in prompt.runs:
        assert prompt.ids[start : start + length] == [at] * length
    (a, _), (b, _), _ = prompt.runs
    assert minimind.decode(prompt.ids[a + 3 : b]) == " then "


def test_images_come_first_each_with_a_newline_where_no_mark_is(minimind):
    unmarked = tokenize_prompt(minimind, "What?", [N, N], "@")
    assert unmarked == tokenize_prompt(minimind, "<image>\n<image>\nWhat?", [N, N], "@")


def test_text_alone_has_no_runs(minimind):
    prompt = tokenize_prompt(minimind, "What is this?", [], "@")
    messages = [{"role": "user", "content": "What is this?"}]
    assert prompt.runs == [] and prompt.ids == minimind.encode(minimind.render(messages))


def test_without_the_chat_template_the_text_stands_alone(minimind):
    prompt = tokenize_prompt(minimind, "<image>\nWhat?", [N], "@", chat=False)
    assert prompt.ids == minimind.encode("@" * N + "\nWhat?")
    assert prompt.runs == [(0, N)]


@pytest.mark.parametrize(
    ("text", "images", "part"),
    [
        ("<image> and <image>", 1, "2 <image> marks but there is 1 image"),
        ("<image>", 3, "1 <image> mark but there are 3 images"),
        ("<image>", 0, "1 <image> mark but there are 0 images"),
    ],
)
def test_marks_and_images_must_be_as_many(words, text, images, part):
    with pytest.raises(UserError, match=part):
        tokenize_prompt(Tokenizer.from_folder(words), text, [N] * images, "@")


def with_template(words, tmp_path, template: str) -> Tokenizer:
    (tmp_path / "tokenizer.json").write_bytes((words / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "{% for",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
    ],
)
def test_a_hostile_or_broken_template_ends_in_one_sentence(words, tmp_path, template):
    with pytest.raises(UserError, match="chat template"):
        with_template(words, tmp_path, template).render([{"role": "user", "content": "x"}])


def test_a_template_that_drops_the_text_is_refused(words, tmp_path):
    with pytest.raises(UserError, match="does not keep the user's text"):
        tokenize_prompt(with_template(words, tmp_path, "hello"), "<image>", [N], "@")


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("tokenizer_config.json", "[", "is not valid JSON"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("tokenizer.json", None, "there is no"),
    ],
)
def test_a_broken_tokenizer_file_is_named(words, tmp_path, name, content, part):
    for file in words.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=part) as refusal:
        Tokenizer.from_folder(tmp_path)
    assert name in str(refusal.value)


def test_text_that_is_no_unicode_is_refused(words):
    with pytest.raises(UserError, match="not valid Unicode"):
        Tokenizer.from_folder(words).encode("\ud800")


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 6399), max_size=30))
def test_the_pieces_of_a_stream_are_the_whole_text(minimind, ids):
    writer = Detokenizer(minimind)
    pieces = [writer.add(i) for i in ids]
    assert "".join(pieces) + writer.finish() == minimind.decode(ids)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=12))
def test_no_piece_shows_half_a_character(minimind, text):
    writer = Detokenizer(minimind)
    for piece in [writer.add(i) for i in minimind.encode(text)]:
        assert INCOMPLETE not in piece or INCOMPLETE in text


def test_the_end_of_an_answer_is_what_the_config_names(minimind, words):
    assert minimind.eos_token_ids == {2}
    assert Tokenizer.from_folder(words).eos_token_ids == {2}


def test_a_prompt_knows_what_a_model_cannot_read_of_it():
    """MLX would read behind the table of embeddings, for a number or a crash."""
    prompt = Prompt([1, 7], [])
    assert prompt.limit_error(2, 8) is None
    assert prompt.limit_error(1, 8) == "has 2 tokens; the model reads up to 1"
    assert prompt.limit_error(2, 7) == "has token 7; the model's vocabulary has 7"
