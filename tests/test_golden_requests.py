"""Requests of every kind give the recorded figures: no change of behaviour goes unnoticed.

The figures were recorded with this library and read; they are no independent oracle.
`python -m tests.test_golden_requests --write` records them again.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from . import conftest  # noqa: F401 (float32 and the BLAS, when this is no test but a command)
from .golden_requests import (
    add_hosts,
    add_llavas,
    answer,
    batch,
    compare,
    evaluation,
    make_folder,
    sampled,
    stream,
)

FILE = Path(__file__).parent / "goldens" / "requests.json"
TOLERANCE = 1e-4  # of floats, which depend on the order of sums; an evaluation's have four digits
COLOUR_TOLERANCE = 2  # of 255, of the mean colour of a part of a picture
SIGN, LEFT, WHAT = (
    "What does the sign say?",
    "what is left of <image> and <image> ?",
    "what is it ?",
)
Request = Callable[[Path], Any]

OURS: dict[str, Request] = {
    "scenes, full beside pruned, in a process": compare,
    "scenes, two images, tome+divprune": partial(answer, "scenes", "xa", SIGN,
        "--pruner tome+divprune --keep-ratio 0.4", overlay=True),
    "scenes, cls_attention+restore": partial(answer, "scenes", "x", SIGN,
        "--pruner cls_attention+restore --keep-ratio 0.25"),
    "scenes, drafts": partial(answer, "scenes", "x", SIGN,
        "--pruner twig --keep-tokens 98 --num-draft-tokens 5"),
    "scenes, in pieces": partial(stream, "scenes", SIGN),
    "scenes, evaluated": partial(evaluation, "scenes", "norm tome fastv",
        "--questions scenes --per-kind 1 --limit 3 --keep-ratio 0.5"),
    "tiny, words alone": partial(answer, "tiny", "", "how many stars ?", ""),
    "tiny, two images, full": partial(answer, "tiny", "ab", LEFT, ""),
    "tiny, fastv, places kept": partial(answer, "tiny", "ab", LEFT,
        "--pruner fastv --keep-ratio 0.6 --positions keep"),
    "tiny, pyramiddrop, places renumbered": partial(answer, "tiny", "ab", LEFT,
        "--pruner pyramiddrop --keep-ratio 0.6 --positions renumber"),
    "tiny, visionzip+pyramiddrop": partial(answer, "tiny", "ab", LEFT,
        "--pruner visionzip+pyramiddrop --keep-ratio 0.45", overlay=True),
    "tiny, pooled": partial(answer, "tiny", "a", "is it red ?",
        "--pruner avgpool --keep-tokens 9 --positions renumber"),
    "tiny, sampled": partial(sampled, "tiny", "ab", LEFT,
        "--pruner visionzip --keep-tokens 7 --temp 30 --top-p 0.8 --seed 11"),
    "tiny, mlp": partial(answer, "tiny", "b", "is it red ?", "--pruner mlp --keep-ratio 0.33"),
    "tiny, sparsevlm": partial(answer, "tiny", "b", "where is the star ?",
        "--pruner sparsevlm --keep-ratio 0.7"),
    "tiny, drafts and fastv": partial(answer, "tiny", "ab", LEFT,
        "--num-draft-tokens 3 --pruner fastv --keep-ratio 0.75"),
    "tiny, evaluated": partial(evaluation, "tiny", "divprune fastv avgpool",
        "--questions ours.jsonl --keep-tokens 12 --keep-tokens 5 --batch 3"),
}  # fmt: skip
LLAVAS: dict[str, Request] = {
    "llava, full": partial(answer, "vicuna", "a", WHAT, ""),
    "llava, prumerge": partial(answer, "vicuna", "ab", WHAT, "--pruner prumerge --keep-ratio 0.5"),
    "llava, fastv": partial(answer, "vicuna", "ab", LEFT, "--pruner fastv --keep-ratio 0.6"),
    "llava of Qwen2 and SigLIP, divprune": partial(answer, "qwen2", "a", WHAT,
        "--pruner divprune --keep-tokens 5 --positions keep", overlay=True),
}  # fmt: skip
HOSTS: dict[str, Request] = {
    "llava host, full": partial(answer, "llava", "ab", "w7 w9", ""),
    "llava host, visionzip": partial(answer, "llava", "ab", "w7 w9",
        "--pruner visionzip --keep-ratio 0.3"),
    "llava host, fastv, in steps": partial(answer, "llava", "ab", "w7 w9",
        "--pruner fastv --keep-ratio 0.6 --prefill-step-size 5"),
    "llava host, divprune+fastv, places kept": partial(answer, "llava", "ab", "w7 w9",
        "--pruner divprune+fastv --keep-ratio 0.5 --positions keep"),
    "llava host, evaluated": partial(evaluation, "llava", "norm fastv tome",
        "--questions theirs.jsonl --keep-ratio 0.75"),
    "qwen2_5_vl host, full": partial(answer, "qwen2_5_vl", "ab", "w7 w9", ""),
    "qwen2_5_vl host, vispruner, in steps": partial(answer, "qwen2_5_vl", "ab", "w7 w9",
        "--pruner vispruner --keep-ratio 0.25 --prefill-step-size 4", overlay=True),
    "qwen2_5_vl host, pyramiddrop": partial(answer, "qwen2_5_vl", "ab", "w7 w9",
        "--pruner pyramiddrop --keep-ratio 0.6", overlay=True),
    "qwen2_5_vl host, fastv, places kept": partial(answer, "qwen2_5_vl", "ab", "w7 w9",
        "--pruner fastv --keep-ratio 0.6 --prefill-step-size 7"),
    "qwen2_5_vl host, divprune+fastv, places renumbered": partial(answer, "qwen2_5_vl", "x",
        "w7 w9", "--pruner divprune+fastv --keep-tokens 12 --positions renumber"
        " --resize-shape 140 112"),
    "qwen2_5_vl host, sampled": partial(sampled, "qwen2_5_vl", "a", "w7 w9",
        "--pruner norm --keep-tokens 4 --temp 5 --top-p 0.9 --seed 3"),
    "qwen2_5_vl host, in pieces": partial(stream, "qwen2_5_vl", "w7 w9"),
    "qwen2_5_vl host, evaluated": partial(evaluation, "qwen2_5_vl", "norm fastv",
        "--questions theirs.jsonl --keep-tokens 7"),
    "smolvlm host, full": partial(answer, "smolvlm", "a", "w7 w9", ""),
    "smolvlm host, divprune": partial(answer, "smolvlm", "bc", "w7 w9",
        "--pruner divprune --keep-ratio 0.5"),
}  # fmt: skip
FAMILIES = [
    "fastvlm", "gemma3", "idefics3", "internvl_chat", "llava", "llava_next", "paligemma",
    "pixtral", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "smolvlm",
]  # fmt: skip
HOSTS |= {f"{kind}, a batch in a block": partial(batch, kind) for kind in FAMILIES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def llavas(folder: Path) -> Path:
    pytest.importorskip("transformers", reason="transformers is not installed")
    add_llavas(folder)
    return folder


@pytest.fixture(scope="module")
def hosts(folder: Path) -> Path:
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
    add_hosts(folder)
    return folder


@pytest.mark.parametrize("name", OURS)
def test_our_own_models_answer_as_recorded(folder, name):
    check(name, OURS[name](folder))


@pytest.mark.parametrize("name", LLAVAS)
def test_llavas_on_our_decoder_answer_as_recorded(llavas, name):
    check(name, LLAVAS[name](llavas))


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("name", HOSTS)
def test_mlx_vlms_models_answer_as_recorded(hosts, name):
    check(name, HOSTS[name](hosts))


def test_every_record_belongs_to_a_request():
    assert {*json.loads(FILE.read_text(encoding="utf-8"))} == {*OURS, *LLAVAS, *HOSTS}


def check(name: str, figures: dict[str, Any]) -> None:
    recorded = json.loads(FILE.read_text(encoding="utf-8"))[name]
    if figures.get("draws") != recorded.get("draws"):
        pytest.skip("this MLX draws other tokens than the one that was recorded with")
    assert not [*differences(json.loads(json.dumps(figures)), recorded)]


def differences(figures: Any, recorded: Any, place: str = "") -> Iterator[str]:
    """Where two JSON values differ: floats by more than TOLERANCE, colours by COLOUR_TOLERANCE."""
    if isinstance(figures, dict) and isinstance(recorded, dict) and {*figures} == {*recorded}:
        for name, value in figures.items():
            yield from differences(value, recorded[name], f"{place}.{name}")
    elif isinstance(figures, list) and isinstance(recorded, list) and len(figures) == len(recorded):
        for n, (value, other) in enumerate(zip(figures, recorded, strict=True)):
            yield from differences(value, other, f"{place}[{n}]")
    elif not (_alike_colours if place.endswith(".blocks") else _alike)(figures, recorded):
        yield f"{place}: {figures} is not {recorded}"


def _alike(value: Any, other: Any) -> bool:
    if isinstance(value, float) and isinstance(other, float):
        return value == pytest.approx(other, rel=TOLERANCE, abs=TOLERANCE)
    return type(value) is type(other) and value == other


def _alike_colours(value: str, other: str) -> bool:
    colours, other_colours = (
        np.frombuffer(bytes.fromhex(x), np.uint8).astype(int) for x in (value, other)
    )
    return (
        colours.shape == other_colours.shape
        and int(np.abs(colours - other_colours).max()) <= COLOUR_TOLERANCE
    )


@pytest.mark.parametrize(
    ("figures", "alike"),
    [
        ({"n": 1.0, "kept": [[0, 2], None], "blocks": "00ff10"}, True),
        ({"n": 1.00009, "kept": [[0, 2], None], "blocks": "02fd10"}, True),
        ({"n": 1.0003, "kept": [[0, 2], None], "blocks": "00ff10"}, False),
        ({"n": 1, "kept": [[0, 2], None], "blocks": "00ff10"}, False),
        ({"n": 1.0, "kept": [[0, 3], None], "blocks": "00ff10"}, False),
        ({"n": 1.0, "kept": [[0, 2, 3], None], "blocks": "00ff10"}, False),
        ({"n": 1.0, "kept": [[0, 2], None], "blocks": "03ff10"}, False),
        ({"n": 1.0, "kept": [[0, 2], None]}, False),
    ],
)
def test_what_counts_as_a_difference(figures, alike):
    recorded = {"n": 1.0, "kept": [[0, 2], None], "blocks": "00ff10"}
    assert ([*differences(figures, recorded)] == []) is alike


def record() -> None:
    """Write FILE, one figure a line."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_folder(Path(temporary))
        add_llavas(folder)
        add_hosts(folder)
        answers = {name: request(folder) for name, request in (OURS | LLAVAS | HOSTS).items()}
    blocks = []
    for name, figures in answers.items():
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in figures.items()]
        blocks.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text("{\n " + ",\n ".join(blocks) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: python -m tests.{Path(__file__).stem} --write")
    record()
