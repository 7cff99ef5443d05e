"""Promises of the options that mlx-lm's and mlx-vlm's users type first: sampling and penalties by
mlx-lm's own functions, further ends of answers, a system message, several images, remote code."""

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_vlm_prune import Chat, batch_generate, generate, load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generate import main
from mlx_vlm_prune.generation import sampling
from mlx_vlm_prune.generation.arguments import build_chat_parser, build_parser
from mlx_vlm_prune.generation.stream import prepare_prompt
from mlx_vlm_prune.inputs.ends import end_token_ids

from .golden_requests import make_folder

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "how many stars ?"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny model (`tiny`) and pictures."""
    return make_folder(tmp_path_factory.mktemp("sampling"))


@pytest.fixture(scope="module")
def loaded(home):
    return load(home / "tiny", dtype="float32")


@pytest.fixture
def sample_utils():
    return pytest.importorskip("mlx_lm.sample_utils", reason="mlx-lm is not installed")


@pytest.mark.parametrize(
    "options",
    [{}, {"top_p": 0.7}, {"top_k": 5}, {"min_p": 0.2}, {"top_k": 9, "min_p": 0.01, "top_p": 0.9}],
)
def test_words_are_drawn_as_mlx_lm_draws_them_with_the_same_seed(
    home, loaded, sample_utils, options
):
    request = dict(image=home / "a.png", max_tokens=8)
    sampler = sample_utils.make_sampler(temp=9.0, **options)
    mx.random.seed(3)
    theirs = generate(*loaded, QUESTION, sampler=sampler, **request)
    mx.random.seed(5)
    before = mx.random.uniform().item()
    mx.random.seed(5)
    ours = generate(*loaded, QUESTION, temperature=9.0, seed=3, **options, **request)
    assert mx.random.uniform().item() == before
    assert ours.token_ids == theirs.token_ids
    other = generate(*loaded, QUESTION, temperature=9.0, seed=4, **options, **request)
    assert other.token_ids != ours.token_ids
    (first, second) = batch_generate(
        *loaded, [QUESTION, QUESTION], [request["image"]] * 2, temperature=9.0, seed=3,
        max_tokens=8, **options,
    )  # fmt: skip
    assert first.token_ids == second.token_ids == ours.token_ids


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
def test_without_mlx_lm_the_same_words_are_drawn_at_a_temperature(
    home, loaded, sample_utils, monkeypatch, top_p
):
    options = dict(image=home / "a.png", max_tokens=12, top_p=top_p, seed=7, temperature=5.0)
    theirs = generate(*loaded, QUESTION, **options)
    loads = []
    monkeypatch.setattr(sampling, "find_spec", lambda name: loads.append(name))  # None
    assert generate(*loaded, QUESTION, **options).token_ids == theirs.token_ids
    assert "mlx_lm" in loads


def test_mlx_lms_functions_come_without_transformers(home):
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    program = (
        "import sys; from mlx_vlm_prune import generate, load; model = load(sys.argv[1]);"
        " generate(*model, 'how many stars ?', temperature=1.0, top_p=0.9, max_tokens=2);"
        " print({'mlx_lm', 'transformers'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", program, str(home / "tiny")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_penalty_is_mlx_lms_before_the_callers_own_processors(home, loaded, sample_utils):
    request = dict(image=home / "a.png", max_tokens=8)
    plain = generate(*loaded, QUESTION, **request)
    processors = sample_utils.make_logits_processors(
        repetition_penalty=1.9, repetition_context_size=6
    )
    theirs = generate(*loaded, QUESTION, logits_processors=processors, **request)
    options = dict(repetition_penalty=1.9, repetition_context_size=6)
    ours = generate(*loaded, QUESTION, **options, **request)
    assert ours.token_ids == theirs.token_ids != plain.token_ids
    lines = []
    generate(
        *loaded, QUESTION, **options, **request,
        logits_processors=[lambda tokens_L, logits_1V: lines.append(tokens_L) or logits_1V],
    )  # fmt: skip
    assert len(lines) >= len(ours.token_ids)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"top_k": -1}, "top_k is -1; it must be a whole number"),
        ({"top_k": 2.5}, "top_k is 2.5; "),
        ({"min_p": 1.5}, "min_p is 1.5; it must be from 0 to 1"),
        ({"repetition_penalty": -1}, "repetition_penalty is -1; it must be 0 or more"),
        ({"repetition_context_size": 0}, "repetition_context_size is 0; it must be at least 1"),
        ({"eos_tokens": 2.5}, "eos_tokens is 2.5; it must be a list of tokens"),
        ({"eos_tokens": [None]}, "eos_tokens is [None]; it must be a list of tokens"),
        ({"system": 3}, "system is 3; it must be a str"),
        ({"repetition_penalty": 2, "num_draft_tokens": 3}, "num_draft_tokens is for plain greedy"),
        ({"top_k": 10**6, "temperature": 1}, "top_k is 1000000; it must be below the vocabulary's"),
        ({"eos_tokens": ["no such token"]}, "eos_tokens has 'no such token', which is no single"),
    ],
)
def test_what_cannot_be_is_a_sentence(loaded, options, sentence):
    with pytest.raises(UserError) as refused:
        generate(*loaded, QUESTION, **options)
    assert str(refused.value).startswith(sentence)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"top_k": 5, "temperature": 1}, "top_k"),
        ({"min_p": 0.5, "temperature": 1}, "min_p"),
        ({"repetition_penalty": 1.5}, "repetition_penalty"),
    ],
)
def test_without_mlx_lm_it_is_said_what_to_install(loaded, monkeypatch, options, name):
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    monkeypatch.setitem(sys.modules, "mlx_lm.sample_utils", None)
    install = r"needs mlx_lm, which is not installed: pip install 'mlx-vlm-prune\[mlx-lm\]'"
    with pytest.raises(UserError, match=f"{name} {install}"):
        generate(*loaded, QUESTION, **options)
    with pytest.raises(UserError, match=f"{name} {install}"):
        Chat(*loaded, **options)
    generate(*loaded, QUESTION, max_tokens=1, top_k=5)  # greedy: none is drawn


def test_a_further_token_ends_an_answer(home, loaded):
    tokenizer = loaded[1].tokenizer
    request = dict(image=home / "a.png", max_tokens=12)
    whole = generate(*loaded, QUESTION, **request)
    n, end = next(
        (n, e) for n, e in enumerate(whole.token_ids) if n and e not in whole.token_ids[:n]
    )
    for token in (end, tokenizer.backend.id_to_token(end), str(end)):
        if isinstance(token, str) and token.isdecimal() and tokenizer.backend.token_to_id(token):
            continue  # a digit is a word of its own
        cut = generate(*loaded, QUESTION, eos_tokens=[token], **request)
        assert (cut.token_ids, cut.finish_reason) == (whole.token_ids[:n], "stop")
        assert cut.generation_tokens == n + 1
    (batched,) = batch_generate(
        *loaded, [QUESTION], [home / "a.png"], max_tokens=12, eos_tokens=[end]
    )
    assert (batched.token_ids, batched.text) == (cut.token_ids, cut.text)
    chat = Chat(*loaded, max_tokens=12, eos_tokens=[end])
    assert chat.ask(QUESTION, home / "a.png").token_ids == cut.token_ids
    assert generate(*loaded, QUESTION, **request).token_ids == whole.token_ids


def test_a_token_is_named_by_its_text_by_an_escape_or_by_its_id():
    words = {"</s>": 2, "7": 9}

    def encode(text):
        return {"\n": [13], "a b": [4, 5]}.get(text, [0])

    names = ["</s>", "\\n", "7", "32007", 11]
    assert end_token_ids(names, words.get, encode, "it") == {2, 13, 9, 32007, 11}
    for unknown in ("a b", "nope"):
        with pytest.raises(UserError, match="no single token of it"):
            end_token_ids([unknown], words.get, encode, "it")


def test_a_system_message_stands_where_the_template_puts_it(home, loaded):
    model, processor = loaded
    tokenizer = processor.tokenizer
    plain, with_system = (
        tokenizer.decode(prepare_prompt(model, processor, QUESTION, system=system).prompt.ids)
        for system in (None, "is it red ?")
    )
    rendered = tokenizer.render(
        [{"role": "system", "content": "is it red ?"}, {"role": "user", "content": QUESTION}]
    )
    assert with_system == tokenizer.decode(tokenizer.encode(rendered)) and "is it red" not in plain
    chat, request = Chat(model, processor, system="is it red ?", max_tokens=4), {"max_tokens": 4}
    first = chat.ask(QUESTION, home / "a.png")
    alone = generate(model, processor, QUESTION, home / "a.png", system="is it red ?", **request)
    assert (first.token_ids, first.prompt_tokens) == (alone.token_ids, alone.prompt_tokens)
    second = chat.ask("what is it ?")
    assert (
        second.prompt_tokens > first.prompt_tokens and chat.rows_reused >= first.prompt_tokens - 8
    )


def test_a_template_without_a_system_message_is_refused(loaded, monkeypatch):
    tokenizer = loaded[1].tokenizer
    bare = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", bare)
    monkeypatch.delitem(vars(tokenizer), "_template", raising=False)
    with pytest.raises(UserError, match=r"does not keep the text of every turn \(system, user\)"):
        generate(*loaded, QUESTION, system="is it red ?")
    monkeypatch.delitem(vars(tokenizer), "_template", raising=False)


def test_the_flags_are_mlx_lms_and_mlx_vlms(home):
    line = (
        "--image a.png b.png --image c.png --system S --top-k 5 --min-p 0.1"
        " --repetition-penalty 1.1 --repetition-context-size 9 --extra-eos-token x y"
        " --eos-tokens z --trust-remote-code"
    ).split()
    for build in (build_parser, build_chat_parser):
        args = build().parse_args(line)
        assert args.image == ["a.png", "b.png", "c.png"] and args.eos_tokens == ["x", "y", "z"]
        assert (args.system, args.top_k, args.min_p) == ("S", 5, 0.1)
        assert (args.repetition_penalty, args.repetition_context_size) == (1.1, 9)
        assert args.trust_remote_code
        assert build().parse_args(["--system-prompt", "S"]).system == "S"


def test_defaults_are_mlx_lms():
    theirs = pytest.importorskip("mlx_lm.generate", reason="mlx-lm is not installed")
    args, theirs = build_parser().parse_args([]), theirs.setup_arg_parser().parse_args([])
    for name in ("temp", "top_p", "top_k", "min_p"):
        ours = args.temperature if name == "temp" else getattr(args, name)
        assert ours == getattr(theirs, name)
    assert args.repetition_context_size == 20 and args.repetition_penalty is None


def test_remote_code_is_refused_with_the_reason(capsys):
    with pytest.raises(UserError, match=r"^trust_remote_code is not possible: .* no code from a"):
        load(trust_remote_code=True)
    with pytest.raises(SystemExit) as stop:
        main(["--trust-remote-code"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: --trust-remote-code is not possible: ")


def test_several_images_after_one_flag_are_answered_about(home, capsys):
    files = [str(home / f"{name}.png") for name in "ab"]
    main(["--model", str(home / "tiny"), "--image", *files, "-p", QUESTION, "-m", "2"])
    assert "Visual tokens: 32 -> 32" in capsys.readouterr().out
