"""Promises about tokenizers from strangers: quick and small, or refused in one sentence."""

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints import tokenizer_check, tokenizer_trial
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.reading.files import parse_json
from mlx_vlm_prune.checkpoints.reading.regexes import read_expression
from mlx_vlm_prune.checkpoints.tokenizer_check import check_tokenizer
from mlx_vlm_prune.inputs.prompt import Tokenizer

from . import host_folders
from .limited import run_limited

WORDS = {"a": 0, "b": 1, " ": 2, "<unk>": 3, "@": 4}
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BPE = {"type": "BPE", "vocab": WORDS, "merges": [], "unk_token": "<unk>"}
BACK = "(a+)+$"  # takes twice as long for each letter of a text that ends in another
PUBLISHED = [  # GPT-2's, Llama 3's, GPT-4o's, DeepSeek's, CLIP's, Bloom's, digits in threes
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{M}]+[\p{Ll}\p{M}]*(?i:'s|'t)?",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+| ?[\p{P}\p{S}]+[\r\n]*|[一-龥぀-ゟ゠-ヿ]+",
    r"<\|startoftext\|>|<\|endoftext\|>|'s|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"\d{1,3}(?=(?:\d{3})*\b)",
    r" {2,}",
]  # fmt: skip
SLOW = [
    BACK, "(a|a)*b", "a*a*b", "a?" * 30 + "a" * 30, r"(\w+)\1", "(((a{100}){100}){100})",
    "a{99999}", "(?x) a", "[a", "a)", "*a", "(" * 99 + "a" + ")" * 99,
]  # fmt: skip


def content(**parts: Any) -> dict[str, Any]:
    names = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    return {"version": "1.0", **dict.fromkeys(names), "added_tokens": [], "model": BPE, **parts}


def write(folder: Path, text: str | dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    text = text if isinstance(text, str) else json.dumps(text)
    (folder / "tokenizer.json").write_text(text)
    return folder


def sequence(kind: str, step: dict[str, Any], times: int = 40) -> dict[str, Any]:
    return {"type": "Sequence", kind: [step] * times}


def charsmap(units: list[int], texts: bytes, claim: int | None = None) -> dict[str, Any]:
    size = 4 * len(units) if claim is None else claim
    data = size.to_bytes(4, "little") + np.array(units, dtype="<u4").tobytes() + texts
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def template(pieces: int, ids: int) -> dict[str, Any]:
    piece = {"SpecialToken": {"id": "b", "type_id": 0}}
    whole = [{"Sequence": {"id": "A", "type_id": 0}}, *[piece] * pieces]
    token = {"id": "b", "ids": [1] * ids, "tokens": ["b"] * ids}
    both = [*whole, {"Sequence": {"id": "B", "type_id": 0}}]
    return {
        "type": "TemplateProcessing", "single": whole, "pair": both, "special_tokens": {"b": token}
    }  # fmt: skip


DOUBLES = sequence("normalizers", DOUBLE)
LATE = json.dumps(content())[:-1]
UNTAGGED = {"pattern": {"String": "a"}, "content": "a" * 100}
WORD = {"type": "WordPiece", "vocab": WORDS, "unk_token": "<unk>", "continuing_subword_prefix": "#"}
REFUSED: dict[str, tuple[str | dict[str, Any], str]] = {
    "a letter doubled forty times": (content(normalizer=DOUBLES), "more than 64 characters of one"),
    "the same behind the model": (LATE + f', "normalizer": {json.dumps(DOUBLES)}}}', "twice"),
    "the same under an escape": (
        json.dumps(content()).replace('"normalizer": null, ', "")[:-1]
        + f', "normali\\u007aer": {json.dumps(DOUBLES)}}}',
        "more than 64 characters of one",
    ),
    "a letter made a hundred": (content(normalizer=UNTAGGED), "more than 64"),
    "what spreads again": (
        content(
            normalizer={
                "type": "Sequence",
                "normalizers": [
                    {"type": "NFKD"}, {**DOUBLE, "content": "\ufdfa"}, {"type": "NFKD"},
                ] * 3,
            }
        ),
        "more than 64",
    ),
    "bytes of bytes": (content(pre_tokenizer=sequence("pretokenizers", BYTES)), "pre_tokenizer"),
    "a decoder": (content(decoder=sequence("decoders", DOUBLE)), "its decoder makes more than 64"),
    "a long beginning": (content(normalizer={"type": "Prepend", "prepend": "a" * 999}), "puts 999"),
    "8 GB claimed": (content(normalizer=charsmap([0], b"x\0", (1 << 32) - 4)), "is damaged"),
    "no table": (
        content(normalizer={"type": "Precompiled", "precompiled_charsmap": "%"}), "is damaged"
    ),
    "outside its table": (content(normalizer=charsmap([1 << 18], b"x\0")), "does not work"),
    "pieces of no length": (
        content(pre_tokenizer={"type": "FixedLength", "length": 0}), "at least 1 is needed"
    ),
    "a million ids around": (content(post_processor=template(2000, 500)), "adds 1000000 tokens"),
    "a word without end": (
        content(model={**WORD, "max_input_chars_per_word": 10**9}), "max_input_chars_per_word"
    ),
    "nested": ('{"normalizer": ' + "[" * 100_000, "nested too deeply"),
    "no tokenizer": ("[]", "must hold a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_tokenizer_that_takes_too_much_is_refused_before_it_is_built(name, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_trial, "SECONDS", 2)
    text, part = REFUSED[name]
    with pytest.raises(UserError, match=part) as refused:
        Tokenizer.from_folder(write(tmp_path / "words", text))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 700


@pytest.fixture
def no_process(monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)


@pytest.mark.parametrize("expression", PUBLISHED)
def test_expressions_of_published_tokenizers_start_no_process(expression, tmp_path, no_process):
    split = {
        "type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    parts = {"type": "Sequence", "pretokenizers": [split, {**BYTES, "use_regex": False}]}
    tokenizer = Tokenizer.from_folder(write(tmp_path / "w", content(pre_tokenizer=parts)))
    assert tokenizer.encode("ab a")


@pytest.mark.parametrize("expression", SLOW)
def test_an_expression_that_may_take_long_is_not_taken_for_harmless(expression):
    assert not read_expression(expression).harmless


@pytest.mark.parametrize(
    "normalizer",
    [
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")],  # Llama's
        [normalizers.Replace("``", '"'), normalizers.NFKD(), normalizers.StripAccents(),
         normalizers.Lowercase()],  # ALBERT's
        [normalizers.BertNormalizer()],
        [normalizers.NFC(), normalizers.Lowercase()],  # CLIP's
    ],
)  # fmt: skip
def test_published_normalizers_start_no_process(normalizer, tmp_path, no_process):
    backend = Backend(models.BPE(WORDS, [], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(normalizer)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_folder(tmp_path).encode("ab a")


def test_a_sound_table_of_replacements_starts_no_process(tmp_path, no_process):
    """One unit for the letter a, whose text is "bb"."""
    units = [0] * 512
    units[0] = 256 << 10  # from the root to 256 + letter
    units[256 ^ ord("a")] = ord("a") | 256 | (1 << 10)  # a text lies one further
    units[256 ^ ord("a") ^ 1] = 1 << 31  # at 0
    folder = write(tmp_path / "w", content(normalizer=charsmap(units, b"bb\0")))
    assert Tokenizer.from_folder(folder).encode("a") == [1, 1]


def test_a_large_vocabulary_is_not_read_to_look_at_what_stands_before_it(monkeypatch):
    vocabulary = {f"w{i}}},": i for i in range(60_000)}
    merges = [f"w{i} w{i + 1}" for i in range(60_000)]
    data = json.dumps(content(model={**BPE, "vocab": vocabulary, "merges": merges}), indent=1)
    sizes = []

    def parse(text: bytes, **options: Any) -> Any:
        sizes.append(len(text))
        return parse_json(text, **options)

    monkeypatch.setattr(tokenizer_check, "parse_json", parse)
    assert check_tokenizer(data.encode(), Path("tokenizer.json")) is None
    assert sizes and sum(sizes) < 1000 < len(data) // 1000


FAILING: dict[str, tuple[dict[str, Any], str]] = {
    "Unigram": (
        content(model={"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0], ["b", -1.0]]}),
        "xyz",
    ),
    "WordLevel": (content(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}), "xyz"),
    "WordPiece": (
        content(model={**WORD, "unk_token": "?", "max_input_chars_per_word": 9}), "xyz"
    ),
    "BPE": (content(model={**BPE, "unk_token": "?"}), "xyz"),
    "an expression": (
        content(
            pre_tokenizer={
                "type": "Split", "pattern": {"Regex": BACK}, "behavior": "Isolated",
                "invert": False,
            }
        ),
        "a" * 45 + "!",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILING)
def test_a_tokenizer_that_fails_on_a_text_says_so_in_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_trial, "SECONDS", 2)
    monkeypatch.setattr(tokenizer_trial, "SAMPLES", ("a",))
    folder, text = write(tmp_path / "w", FAILING[name][0]), FAILING[name][1]
    tokenizer = Tokenizer.from_folder(folder)
    with pytest.raises(UserError, match=str(folder)) as refused:
        tokenizer.encode(text)
    assert "\n" not in str(refused.value)


def test_a_token_of_a_megabyte_is_not_printed(tmp_path):
    model = {**BPE, "vocab": {**WORDS, "x" * 1_000_000: 5}}
    tokenizer = Tokenizer.from_folder(write(tmp_path / "w", content(model=model)))
    with pytest.raises(UserError, match="makes 1000000 characters of 1 ids"):
        tokenizer.decode([5])


def test_mlx_vlm_is_handed_no_such_tokenizer_or_template(tmp_path):
    folder = host_folders.checkpoint("qwen3_vl", tmp_path)
    file = folder / "tokenizer.json"
    whole = file.read_text()
    file.write_text(json.dumps(json.loads(whole) | {"normalizer": DOUBLES}))
    with pytest.raises(UserError, match="more than 64 characters of one"):
        load(folder)
    file.write_text(whole)
    model, processor = load(folder)
    from mlx_vlm_prune import generate

    processor.chat_template = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    with pytest.raises(UserError, match="the chat template of this qwen3_vl model is refused"):
        generate(model, processor, "w1", max_tokens=1)


FUZZ = """
import json, random, sys
from pathlib import Path
from tests import test_hostile_tokenizers as t
from mlx_vlm_prune.checkpoints import tokenizer_check, tokenizer_trial
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.inputs.prompt import Tokenizer

tokenizer_trial.SECONDS, counts = 1, {"read": 0, "refused": 0}
for seed in range(1000):
    folder = t.write(Path(sys.argv[1]), t.drawn(random.Random(seed)))
    try:
        tokenizer = Tokenizer.from_folder(folder)
        for text in ("", "a b", "ab" * 200, "é\\ufdfa \\u0130", " " * 50):
            tokenizer.decode(tokenizer.encode(text))
            tokenizer.missing_bos(text)
        counts["read"] += 1
    except UserError as e:
        assert "\\n" not in str(e) and len(str(e)) < 900
        counts["refused"] += 1
print(counts["read"], counts["refused"])
"""
STEPS: dict[str, list[dict[str, Any]]] = {
    "normalizer": [
        DOUBLE, UNTAGGED, {"type": "NFKD"}, {"type": "Lowercase"},
        {"type": "Prepend", "prepend": "a"},
        {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
        {"type": "Replace", "pattern": {"String": ""}, "content": "x"}, {"type": "Nonsense"},
        charsmap([0] * 256, b"\0"), {"type": "Precompiled"},
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
         "strip_accents": None, "lowercase": True}, BYTES, {"type": "StripAccents"},
    ],
    "pre_tokenizer": [
        BYTES, {"type": "Whitespace"}, {"type": "FixedLength", "length": 0}, {"type": "Digits"},
        {"type": "FixedLength", "length": 3}, {"type": "BertPreTokenizer"}, {"type": "Metaspace"},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        {"type": "Split", "pattern": {"Regex": PUBLISHED[0]}, "behavior": "Isolated",
         "invert": False}, {"type": "CharDelimiterSplit", "delimiter": "a"}, {"length": -1},
    ],
    "decoder": [
        DOUBLE, BYTES, {"type": "Fuse"}, {"type": "ByteFallback"}, {"type": "WordPiece"},
        {"type": "Strip", "content": " ", "start": 10**18, "stop": 0}, {"type": "BPEDecoder"},
        {"type": "WordPiece", "prefix": "#", "cleanup": True}, {"type": "CTC"},
    ],
    "post_processor": [
        template(2, 2), template(99, 99), BYTES, {"type": "BertProcessing", "sep": ["b", 1],
        "cls": ["a", 0]}, {"type": "TemplateProcessing"},
    ],
}  # fmt: skip
MODELS: list[Any] = [
    BPE, WORD | {"max_input_chars_per_word": 100}, WORD | {"max_input_chars_per_word": -1},
    {"type": "WordLevel", "vocab": WORDS, "unk_token": "<unk>"}, {**BPE, "merges": ["a b"]},
    {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0], ["b", -1.0]], "byte_fallback": True},
    {"type": "Unigram", "unk_id": 9, "vocab": []}, {**BPE, "dropout": 2.0}, None, {"vocab": {}},
    {**BPE, "continuing_subword_prefix": "#" * 9999}, {**BPE, "vocab": {"a": 1 << 40}}, {**BPE,
    "vocab": {**WORDS, "ab": 9}, "merges": [["a", "b"]]}, {**BPE, "byte_fallback": True},
]  # fmt: skip


def drawn(draw: Any) -> str:
    """A tokenizer.json of parts that are sound or not, some of its characters changed."""
    parts: dict[str, Any] = {"model": draw.choice(MODELS)}
    plural = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
    for name, steps in STEPS.items():
        if draw.random() < 0.5:
            listed = [draw.choice(steps) for _ in range(draw.choice((1, 1, 2, 3, 9)))]
            key = plural.get(name, "processors")
            parts[name] = listed[0] if len(listed) == 1 else {"type": "Sequence", key: listed}
    if draw.random() < 0.5:
        token = {"id": draw.choice((0, 5, 77, -1)), "content": draw.choice(("a", "<s>", "", "é"))}
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        parts["added_tokens"] = [token | {flag: draw.random() < 0.5 for flag in flags}]
    text = list(json.dumps(content(**parts)))
    for _ in range(draw.choice((0, 0, 0, 1, 3))):
        text[draw.randrange(len(text))] = draw.choice('0123"{}[],:aZ\\- ')
    return "".join(text)


def test_a_thousand_tokenizers_are_read_or_refused_within_limits(tmp_path):
    read, refused = run_limited(FUZZ, tmp_path / "words", seconds=60).split()
    assert int(read) > 50 and int(refused) > 50
