"""Promises of training examples: answers alone are learned, behind prompts that ask for them."""

import numpy as np
import pytest

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.inputs.processor import Processor
from mlx_vlm_prune.inputs.prompt import VICUNA, Tokenizer, tokenize_prompt
from mlx_vlm_prune.training.conversations import render_turns
from mlx_vlm_prune.training.examples import tokenize_example

from .llava import LLAVA_1_5, llama_words
from .training_examples import CLIP_64, CONFIG, example, learned, of_words, png, talk

SHORT = [  # (system, turns) without white space at their ends
    ("", [("What?", "A cat.")]),
    (
        "Be brief.",
        [("What colour is it?", "red"), ("And\n\nthe other?", "a"), ("Why?", "<b> 你好\n\n1")],
    ),
    ("", [("hi", "think"), ("im_end|>?", "assistant")]),
]
THOUGHT = [("Why?", "<think>\nhm\n</think>\n\nYes."), ("So?", "No.")]
QWEN = (  # Qwen3's, but for its tools: thoughts of earlier turns leave
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}{%- set thought = '' %}{%- set content = m.content %}"
    "{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}"
    "{%- generation %}{{- content + '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
WITH_SPAN = (  # LLaVA-1.5's at Hugging Face, which says what an assistant says
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% if m['role'] != 'assistant' %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}"
    "{% endfor %}{% else %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ c['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.fixture
def words(tmp_path) -> Processor:
    return of_words(tmp_path / "words")


@pytest.fixture(params=["minimind2", "minimind3"])
def minimind(request, shared_data) -> Processor:
    tokenizer = Tokenizer.from_folder(shared_data / request.param)
    token = {"minimind2": "@", "minimind3": "<|image_pad|>"}[request.param]
    return Processor(tokenizer, CLIP_64, token, request.param, shared_data / request.param)


def labels_of_the_authors(ids, tokenizer):
    """What minimind-v learns (lm_dataset.py): what stands behind `<|im_start|>assistant` and a
    line's end, up to `<|im_end|>` and a line's end."""
    begin, end = (tokenizer.encode(t) for t in ("<|im_start|>assistant\n", "<|im_end|>\n"))
    is_learned, at = np.zeros(len(ids), bool), 0
    while at < len(ids):
        if ids[at : at + len(begin)] != begin:
            at += 1
            continue
        start = at = at + len(begin)
        while at < len(ids) and ids[at : at + len(end)] != end:
            at += 1
        at = min(at + len(end), len(ids))
        is_learned[start:at] = True
    return is_learned


@pytest.mark.parametrize(("system", "turns"), SHORT)
def test_the_authors_of_minimind_learn_the_same_but_for_what_the_prompt_ends_with(
    minimind, system, turns
):
    """They learn the line's end behind an answer and the empty thoughts before it, too. Nothing is
    said behind the token that ends an answer, and the prompt has the thoughts."""
    tokenizer = minimind.tokenizer
    read = tokenize_example(minimind, example([], *turns, system=system), CONFIG.N, 10_000)
    ids, theirs = read.prompt.ids, labels_of_the_authors(read.prompt.ids, tokenizer)
    thoughts = tokenizer.encode("<think>\n\n</think>\n\n")
    expected = theirs.copy()
    for at in np.flatnonzero(theirs):
        if ids[at - 1] == tokenizer.token_id("<|im_end|>"):
            expected[at] = False
        if minimind.name == "minimind3" and ids[at : at + len(thoughts)] == thoughts:
            expected[at : at + len(thoughts)] = False
    assert (read.is_answer == expected).all() and expected.sum() >= 2 * len(turns)


@pytest.mark.parametrize("options", [{}, {"open_thinking": True}, {"enable_thinking": False}])
@pytest.mark.parametrize(("system", "turns"), [*SHORT, ("", THOUGHT), ("Be.", THOUGHT[:1])])
def test_an_answer_stands_behind_the_very_prompt_that_asks_for_it(minimind, system, turns, options):
    """Of one turn, whose prompt `generate` builds: id by id."""
    tokenizer = minimind.tokenizer
    if not system:
        (question, answer), *_ = turns
        single = example([png()], (question, answer))
        read = tokenize_example(minimind, single, CONFIG.N, 10_000, options)
        first = int(read.is_answer.argmax())
        thinks = "</think>" in answer and minimind.name == "minimind3"
        wanted = {"open_thinking": True} if thinks else options
        if not ("</think>" in answer and options.get("enable_thinking") is False):
            prompt = tokenize_prompt(
                tokenizer, question, [CONFIG.N], minimind.image_token, options=wanted
            )
            assert (read.prompt.ids[:first], read.prompt.runs) == (prompt.ids, prompt.runs)
    text, spans = render_turns(tokenizer, turns, system, options)
    for (begin, end), (_, answer) in zip(spans, turns, strict=True):
        assert text[begin:end].endswith(answer.split("</think>")[-1].lstrip() + "<|im_end|>")
        assert text[:begin].endswith(("assistant\n", "<think>\n", "</think>\n\n"))


def theirs_with(processor, template):
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(processor.folder)
    reference.chat_template = processor.tokenizer.chat_template = template
    return reference


def assistants_mask(reference, messages):
    read = reference.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    return read["input_ids"], np.array(read["assistant_masks"], bool)


@pytest.mark.parametrize(("system", "turns"), SHORT)
@pytest.mark.parametrize("kind", ["own", "qwen"])
def test_transformers_marks_the_same_ids_where_a_template_says_what_an_assistant_says(
    minimind, kind, system, turns
):
    template = QWEN
    if kind == "own":
        template = minimind.tokenizer.chat_template
        content = {"minimind2": "content", "minimind3": "content.lstrip('\\n')"}[minimind.name]
        before, _, after = template.rpartition(f" + {content} }}}}")
        span = f"{{%- generation %}}{{{{- {content} }}}}{{%- endgeneration %}}"
        template = f"{before} }}}}{span}{after}"
        template = template.replace(
            "        {{- '<|im_end|>\\n' }}\n    {%- elif message.role == \"tool\"",
            "        {%- generation %}{{- '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}\n"
            '    {%- elif message.role == "tool"',
        )
        assert template.count("generation %}") == 4
    reference = theirs_with(minimind, template)
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += talk(question, answer)
    ids, mask = assistants_mask(reference, messages)
    options = {"enable_thinking": False} if kind == "qwen" else {}
    read = tokenize_example(minimind, example([], *turns, system=system), CONFIG.N, 10_000, options)
    if kind == "qwen":  # the prompt has empty thoughts for every turn, the past only for the last
        assert [i for i, is_theirs in zip(ids, mask, strict=True) if is_theirs] == [
            i for i, is_ours in zip(read.prompt.ids, read.is_answer, strict=True) if is_ours
        ]
    else:
        assert read.prompt.ids == ids
        assert (read.is_answer == mask).all()


def test_qwens_thoughts_are_read_where_the_prompt_has_them_and_learned_where_it_does_not(minimind):
    minimind.tokenizer.chat_template = QWEN
    tokenizer, turns = minimind.tokenizer, [("One?", "1"), ("Two?", "2")]
    text, spans = render_turns(tokenizer, turns)
    assert [text[a:b] for a, b in spans] == ["1<|im_end|>", "<think>\n\n</think>\n\n2<|im_end|>"]
    text, spans = render_turns(tokenizer, turns, options={"enable_thinking": False})
    assert [text[a:b] for a, b in spans] == ["1<|im_end|>", "2<|im_end|>"]
    assert all(text[:a].endswith("<think>\n\n</think>\n\n") for a, _ in spans)
    text, spans = render_turns(tokenizer, THOUGHT[::-1])
    assert text[slice(*spans[1])] == "<think>\nhm\n</think>\n\nYes.<|im_end|>"


@pytest.mark.parametrize("template", [VICUNA, LLAVA_1_5, WITH_SPAN])
def test_llavas_answers_end_with_the_token_that_its_template_leaves_out(template, tmp_path):
    folder = llama_words(tmp_path / "llama", template)
    llama = Processor(Tokenizer.from_folder(folder), CLIP_64, "<image>", "llama", folder)
    talked = example([png()], ("<image>\nHi", "a b"), ("And?", "c"), system="Be brief.")
    answers = [map(llama.tokenizer.backend.id_to_token, ids) for ids in learned(llama, talked)]
    assert list(map("".join, answers)) == ["▁a▁b</s>", "▁c</s>"]
    text, _ = render_turns(llama.tokenizer, [("Hi", "a")])
    assert text.startswith("<s>")
    read = tokenize_example(llama, example([png()], ("Hi", "a")), CONFIG.N, 999)
    prompt = tokenize_prompt(llama.tokenizer, "Hi", [CONFIG.N], "<image>")
    assert read.prompt.ids[: len(prompt.ids)] == prompt.ids
    if template == WITH_SPAN:
        reference = theirs_with(llama, template)
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for role, text in (("user", "Hi"), ("assistant", "a b"))
        ]
        ids, mask = assistants_mask(reference, messages)
        theirs = "".join(reference.convert_ids_to_tokens(np.array(ids)[mask]))
        assert theirs.strip("▁") == "a▁b"


def test_a_template_that_changes_or_drops_a_turn_is_refused(words):
    cases = [
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "text of every turn"),
        ("{% for m in messages[1:] %}{{ m.content }}{% endfor %}", "system, user"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "an answer's text"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}"
         "{% if add_generation_prompt %}<think>{% endif %}", "asks for an answer by '.*<think>'"),
    ]  # fmt: skip
    for template, fault in cases:
        tokenizer = Tokenizer(words.tokenizer.backend, {}, template)
        with pytest.raises(UserError, match=fault):
            render_turns(tokenizer, [("hello", "you")], "be")


def test_white_space_before_an_answer_becomes_the_ids_that_a_prompt_has(tmp_path):
    """As of GPT-2: two line ends in one id where nothing follows, in two where a word does."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    letters = {sign: n for n, sign in enumerate([*map(chr, range(33, 127)), "Ċ", "Ġ", "ĊĊ"])}
    backend = Backend(models.BPE(letters, [("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    template = (
        "{% for m in messages %}{{ m.role }}:\n\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n\n{% endif %}"
    )
    tokenizer = Tokenizer(backend, {}, template)
    processor = Processor(tokenizer, CLIP_64, "@", "bpe")
    read = tokenize_example(processor, example([], ("hi", "ho"), ("q", "a")), CONFIG.N, 999)
    prompt = tokenize_prompt(tokenizer, "hi", [], "@")
    assert read.prompt.ids[: len(prompt.ids)] == prompt.ids
    assert (
        tokenizer.encode(render_turns(tokenizer, [("hi", "ho")])[0])[: len(prompt.ids)]
        != prompt.ids
    )
    assert (
        tokenizer.decode(read.prompt.ids) == render_turns(tokenizer, [("hi", "ho"), ("q", "a")])[0]
    )


def test_images_stand_where_their_marks_are_or_first(words):
    pair = ("<image> and <image> are there?", "yes")
    read = tokenize_example(words, example([png()] * 2, pair), CONFIG.N, 999)
    assert [length for _, length in read.prompt.runs] == [16, 16]
    assert read.prompt.runs[1][0] == read.prompt.runs[0][0] + 17
    read = tokenize_example(
        words, example([png()], ("are there?", "yes"), ("a", "no")), CONFIG.N, 999
    )
    assert read.prompt.runs == [(2, 16)]
    with pytest.raises(UserError, match=r"2 <image> marks but 1 image$"):
        tokenize_example(words, example([png()], pair), CONFIG.N, 999)
    with pytest.raises(UserError, match="2 <image> marks but no images"):
        tokenize_example(words, example([], pair), CONFIG.N, 999)


def test_long_ones_are_cut_ahead_of_an_image_that_would_not_be_whole(words):
    turns = [("<image> read", "yes"), ("<image> say", "no")]
    long = example([png()] * 2, *turns)
    whole = tokenize_example(words, long, CONFIG.N, 999)
    length = len(whole.prompt.ids)
    assert not tokenize_example(words, long, CONFIG.N, length).was_cut
    cut = tokenize_example(words, long, CONFIG.N, length - 10)
    assert cut.was_cut and len(cut.prompt.runs) == 1
    assert cut.prompt.ids == whole.prompt.ids[: whole.prompt.runs[1][0]]
    assert cut.is_answer.sum() == 2
    with pytest.raises(UserError, match=r"none of its answers begins within max_seq_length=18"):
        tokenize_example(words, long, CONFIG.N, 18)
