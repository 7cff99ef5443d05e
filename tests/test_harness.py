"""Promises of lmms-eval's model: messages and options as they are meant, answers as `generate`'s.

None of it needs lmms-eval; what it does with its evaluator: tests/test_lmms_eval.py.
"""

import logging
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.evaluation.harness import messages as harness_messages
from mlx_vlm_prune.evaluation.harness.answering import (
    HostAnswers,
    TaskQuestion,
    answer_questions,
    running_batch,
)
from mlx_vlm_prune.evaluation.harness.messages import TaskPrompt, read_messages
from mlx_vlm_prune.evaluation.harness.options import (
    RunOptions,
    read_generation_kwargs,
    read_run_options,
)
from mlx_vlm_prune.generation.request import Request
from mlx_vlm_prune.inputs.messages import Turn
from mlx_vlm_prune.scenes import compose

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
SCENES = [compose(1_000_000_000 + n).image() for n in (0, 1, 2)]
TEXT = {"type": "text", "text": "  Is it\nred? "}
PICTURE, OTHER = ({"type": "image", "url": name} for name in ("a.png", "b.png"))


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [*parts]}


def spoken(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def test_a_question_keeps_its_text_to_the_last_space_and_its_pictures_in_order():
    prompt = read_messages([user(PICTURE, OTHER, TEXT, {"type": "text", "text": "."})], True)
    assert prompt == TaskPrompt("  Is it\nred? .", ["a.png", "b.png"])
    assert read_messages([{"role": "user", "content": "Why?"}], True) == TaskPrompt("Why?", [])


def test_pictures_between_texts_are_marked_where_the_model_takes_marks(caplog):
    turn = user(TEXT, PICTURE, {"type": "text", "text": "and"}, OTHER)
    assert read_messages([turn], True).text == "  Is it\nred? <image>and<image>"
    harness_messages._warn_of_order.cache_clear()
    for _ in range(2):
        assert read_messages([turn], False).text == "  Is it\nred? and"
    assert ["chat template places them" in record.message for record in caplog.records] == [True]


MARKED = {"type": "text", "text": "Is <image> like <image>?"}


@pytest.mark.parametrize(
    ("parts", "marked", "plain"),
    [
        ((PICTURE, OTHER, MARKED), "Is <image> like <image>?", "Is  like ?"),
        ((PICTURE, MARKED), "Is  like ?", "Is  like ?"),
        ((MARKED,), "Is  like ?", "Is  like ?"),
        ((MARKED, PICTURE, TEXT, OTHER), "Is  like ?<image>  Is it\nred? <image>",
         "Is  like ?  Is it\nred? "),
    ],
)  # fmt: skip
def test_marks_in_a_text_place_its_pictures_or_are_left_out_and_said_once(
    parts, marked, plain, caplog
):
    harness_messages._warn_of_marks.cache_clear()
    assert read_messages([user(*parts)], True).text == marked
    assert read_messages([user(*parts)], False).text == plain
    warned = ["where no picture can be placed" in record.message for record in caplog.records]
    assert warned.count(True) == 1


def test_marks_in_other_texts_are_left_out():
    talk = [spoken("system", "Be <image>brief."), user(PICTURE, MARKED),
            spoken("assistant", "n<image>o"), user(TEXT)]  # fmt: skip
    prompt = read_messages(talk, True)
    assert prompt.system == "Be brief." and prompt.history == (Turn("Is  like ?", 1, "no"),)


def test_examples_before_a_question_are_its_history():
    talk = [
        spoken("system", "Be brief."),
        user(PICTURE, TEXT),
        spoken("assistant", "no"),
        user(OTHER),
    ]
    prompt = read_messages(talk, True)
    assert prompt.system == "Be brief." and prompt.history == (Turn("  Is it\nred? ", 1, "no"),)
    assert (prompt.text, prompt.images) == ("", ["a.png", "b.png"])


@pytest.mark.parametrize(
    ("talk", "sentence"),
    [
        ([], "its messages are from nobody"),
        ([user(TEXT), user(TEXT)], "from user, user; they must be the user's and the assistant's"),
        ([user(TEXT), spoken("assistant", "no")], "and end with the user's"),
        ([spoken("assistant", "no"), user(TEXT)], "from assistant, user"),
        ([user({"type": "video", "url": "a.mp4"})], "it shows a part of type video"),
        ([user({"type": "audio", "url": {}})], "it shows a part of type audio"),
        ([user({"type": "image"})], "a part of a message is {'type': 'image'}"),
        ([user({"type": "text", "text": 7})], "it must be a text or an image"),
        ([{"role": "tool", "content": "x"}], "its role must be system, user"),
        (["x"], "a message is 'x'"),
        ("x", "its messages are 'x'; they must be a list"),
        ([user(TEXT), {"role": "assistant", "content": [PICTURE]}, user(TEXT)], "not the user's"),
    ],
)
def test_what_cannot_be_asked_is_refused_and_never_left_out(talk, sentence):
    with pytest.raises(UserError) as problem:
        read_messages(talk, True)
    assert sentence in str(problem.value)


def test_model_args_come_as_lmms_eval_parses_them():
    given = {"model": 7, "pruner": "'similarity:a=1,b=2'", "keep_ratio": 0.25, "batch_size": "4"}
    options = read_run_options({**given, "device": "cuda:0", "max_batch_size": 8})
    assert (options.model, options.pruner) == ("7", "similarity:a=1,b=2")
    assert (options.keep_ratio, options.batch_size) == (0.25, 4)
    assert options.request == {
        "pruner": "similarity:a=1,b=2", "keep_ratio": 0.25, "keep_tokens": None,
        "positions": None, "max_pixels": None,
    }  # fmt: skip
    thinking = read_run_options({"enable_thinking": False}).request
    assert thinking["chat_template_config"] == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"prunner": "norm"}, "model_args has no prunner; there are model, pruner, keep_ratio"),
        ({"keep_ratio": 2.0}, "keep_ratio is 2.0"),
        ({"keep_ratio": 0.5, "keep_tokens": 9}, "give keep_ratio or keep_tokens, not both"),
        ({"batch_size": "auto"}, "batch_size is 'auto'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"cache_gb": -1}, "cache_gb is -1"),
        ({"max_pixels": "many"}, "max_pixels is 'many'"),
        ({"cache_gb": "many"}, "cache_gb is 'many'; it must be a number, 0 or more"),
        ({"seed": "x"}, "seed is 'x'; it must be a whole number, 0 or more"),
        ({"enable_thinking": "no"}, "enable_thinking is 'no'; it must be true or false"),
    ],
)
def test_model_args_that_cannot_be_are_refused(arguments, sentence):
    with pytest.raises(UserError) as problem:
        read_run_options(arguments)
    assert sentence in str(problem.value)


RUN = RunOptions(max_new_tokens=40, seed=5)
GREEDY = {"max_tokens": 40, "temperature": 0.0}


@pytest.mark.parametrize(
    ("kwargs", "expected", "until"),
    [
        ({}, GREEDY, ()),
        ({"max_new_tokens": 16, "until": "\n"}, {**GREEDY, "max_tokens": 16}, ("\n",)),
        ({"until": ["\n\n", None, ""], "top_p": None, "num_beams": 1}, GREEDY, ("\n\n",)),
        ({"temperature": 0, "top_p": 0.5, "do_sample": True, "until": None}, GREEDY, ()),
        ({"temperature": 0.7, "do_sample": False}, GREEDY, ()),
        ({"do_sample": True}, {"max_tokens": 40, "temperature": 1.0, "seed": 7}, ()),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1},
         {"max_tokens": 40, "temperature": 0.7, "top_p": 0.9, "top_k": 3, "min_p": 0.1,
          "repetition_penalty": 1.1, "seed": 7}, ()),
        ({"temperature": 0.5, "seed": 1}, {"max_tokens": 40, "temperature": 0.5, "seed": 3}, ()),
        ({"repetition_penalty": 1.2}, {**GREEDY, "repetition_penalty": 1.2}, ()),
    ],
)  # fmt: skip
def test_a_tasks_generation_kwargs_are_followed_as_transformers_does(kwargs, expected, until):
    decoding = read_generation_kwargs(kwargs, RUN, turn=2)
    assert (decoding.request, decoding.until) == (expected, until)


def test_what_is_not_followed_is_said_once_and_beams_are_refused(caplog):
    for _ in range(2):
        read_generation_kwargs({"image_aspect_ratio": "pad", "max_new_tokens": 1}, RUN, 0)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "image_aspect_ratio" in caplog.text
    with pytest.raises(UserError, match="num_beams is 3, and there is no beam search here"):
        read_generation_kwargs({"num_beams": 3}, RUN, 0)
    with pytest.raises(UserError, match="until is 7"):
        read_generation_kwargs({"until": 7}, RUN, 0)


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"seed": "1", "temperature": 1.0}, "seed is '1'; it must be a whole number, 0 or more"),
        ({"temperature": "0"}, "temperature is '0'; it must be a number"),
        ({"do_sample": "false"}, "do_sample is 'false'; it must be true or false"),
        ({"num_beams": "1"}, "num_beams is '1'; it must be a whole number, at least 1"),
    ],
)
def test_options_of_another_kind_are_refused_also_where_nothing_is_drawn(kwargs, sentence):
    with pytest.raises(UserError) as problem:
        read_generation_kwargs(kwargs, RUN, 0)
    assert sentence in str(problem.value)


@pytest.fixture(scope="module")
def scenes():
    return load()


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
    from . import host_folders

    folder = host_folders.checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("hosts"))
    return load(folder, dtype="float32")


def ask(loaded: Any, options: RunOptions, questions: list[tuple[dict[str, Any], tuple[str, ...]]]):
    """What the harness answers to requests with these texts that end an answer."""
    tasks = [
        TaskQuestion(f"question {n} of made", partial(Request, **options.request, **request), until)
        for n, (request, until) in enumerate(questions)
    ]
    with running_batch(*loaded, options) as batch:
        answers = dict(answer_questions(batch, tasks, options.batch_size))
    assert sorted(answers) == list(range(len(questions)))
    return [answers[n] for n in range(len(questions))]


WORDS = [
    "What does the sign say?",
    "Read the sign.",
    "Is there a star?",
    "How many stars are there?",
]


def requests(words: list[str]) -> list[dict[str, Any]]:
    """Texts about one, two and no pictures, greedy and drawn, of different lengths."""
    pictures = [SCENES[:1], SCENES[1:], [], SCENES[2:]]
    return [
        {"prompt": text, "images": pictures[n], "max_tokens": 3 + n, "temperature": n % 2 * 1.5}
        for n, text in enumerate(words)
    ]


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("kind", ["scenes", "host"])
def test_answers_of_a_batch_are_those_that_generate_gives_alone(kind, at_once, request):
    loaded = request.getfixturevalue(kind)
    listed = requests(WORDS if kind == "scenes" else ["w7 w9", "w3 w11", "w4 w8", "w5"])
    if kind == "host":  # mlx-vlm's batches draw otherwise than its loop does
        listed = [each | {"temperature": 0.0} for each in listed]
    options = RunOptions(pruner="divprune", keep_ratio=0.25, batch_size=at_once)
    answers = ask(loaded, options, [(each, ()) for each in listed])
    for each, answer in zip(listed, answers, strict=True):
        alone = dict(each)
        whole = generate(*loaded, alone.pop("prompt"), alone.pop("images"), pruner="divprune",
                         keep_ratio=0.25, **alone)  # fmt: skip
        assert (answer.text, answer.prompt_tokens) == (whole.text, whole.prompt_tokens)
        assert answer.generation_tokens == whole.generation_tokens
        assert answer.figures and answer.figures.visual_tokens_kept == whole.visual_tokens_kept


def test_methods_between_the_layers_work_in_mlx_vlms_models_one_by_one(host):
    request = {"prompt": "w7 w9", "images": SCENES[:1], "max_tokens": 4}
    options = RunOptions(pruner="fastv", keep_ratio=0.5)
    with running_batch(*host, options) as batch:
        assert isinstance(batch, HostAnswers)
    (answer,) = ask(host, options, [(request, ())])
    whole = generate(*host, "w7 w9", SCENES[:1], pruner="fastv", keep_ratio=0.5, max_tokens=4)
    assert answer.text == whole.text and answer.figures
    assert answer.figures.visual_tokens_kept == whole.visual_tokens_kept
    with (
        pytest.raises(UserError, match=r"fastv works between .* give batch_size 1$"),
        running_batch(*host, replace(options, batch_size=2)),
    ):
        pass


@pytest.mark.parametrize(("gigabytes", "runs"), [(0.0, 2), (1.0, 1)])
def test_cache_gb_bounds_what_is_held_of_pictures_with_such_a_method_too(host, gigabytes, runs):
    options = RunOptions(pruner="fastv", keep_ratio=0.5, cache_gb=gigabytes)
    request = Request("w7 w9", SCENES[:1], max_tokens=1, **options.request)
    with running_batch(*host, options) as batch:
        for _ in range(2):
            batch.add("a", batch.prepare(request))
            assert len([*batch.step()]) == 1
            batch.clear()
        towers = batch.conversation.towers
        assert towers.misses == runs and (towers.store.nbytes > 0) is (gigabytes > 0)
    assert not towers.store.nbytes


@pytest.mark.parametrize("kind", ["scenes", "host", "one by one"])
def test_an_answer_ends_before_a_text_of_the_tasks_and_no_more_is_written(kind, request):
    loaded = request.getfixturevalue("scenes" if kind == "scenes" else "host")
    text = WORDS[0] if kind == "scenes" else "w7 w9"
    options = RunOptions(pruner="fastv" if kind == "one by one" else "norm", keep_ratio=0.5)
    full = {"prompt": text, "images": SCENES[:1], "max_tokens": 12, "temperature": 2.0, "seed": 3}
    (whole,) = ask(loaded, options, [(full, ())])
    assert len(whole.text) > 4
    end = whole.text[2:4]
    cut, other = ask(loaded, options, [(full, ("never", end)), ({**full, "max_tokens": 2}, ())])
    assert cut.text == whole.text[: whole.text.index(end)]
    assert cut.generation_tokens < whole.generation_tokens and other.text


@pytest.mark.parametrize(
    ("kind", "at_once"), [("scenes", 1), ("scenes", 3), ("host", 1), ("host", 2)]
)
def test_an_error_ends_the_run_and_names_the_question(kind, at_once, request, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    listed = requests(WORDS if kind == "scenes" else ["w7 w9", "w3 w11", "w4 w8", "w5"])
    listed[2]["images"] = [tmp_path / "broken.png"]
    options = RunOptions(batch_size=at_once)
    with pytest.raises(UserError, match=r"^question 2 of made: .*broken\.png"):
        ask(request.getfixturevalue(kind), options, [(each, ()) for each in listed])


def test_drawn_answers_of_mlx_vlms_models_do_not_depend_on_their_neighbours(host):
    listed = [(each | {"temperature": 1.5}, ()) for each in requests(["w7", "w3 w11", "w4", "w5"])]
    one, three = (ask(host, RunOptions(batch_size=n), listed) for n in (1, 3))
    assert [answer.text for answer in one] == [answer.text for answer in three]


def test_a_model_of_mlx_vlms_is_left_as_it_was(host):
    base = type(host[0].language_model)
    with pytest.raises(UserError), running_batch(*host, RunOptions(pruner="nonsense")):
        pass
    with running_batch(*host, RunOptions(pruner="norm", keep_ratio=0.5)):
        assert type(host[0].language_model) is not base
    assert type(host[0].language_model) is base


def test_an_answer_in_place_of_a_repeat_is_drawn_by_another_seed(scenes):
    turns = Counter[str]()
    for turn in range(6):
        decoding = read_generation_kwargs({"temperature": 30.0, "max_new_tokens": 6}, RUN, turn)
        request = {"prompt": WORDS[3], "images": SCENES[:1], **decoding.request}
        turns[ask(scenes, RUN, [(request, ())])[0].text] += 1
    assert len(turns) > 3
