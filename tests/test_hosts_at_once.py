"""Promises about several requests at once on one model: each gets the answer that it gets alone.

Threads run in a process of their own, since a fault there ends it with a signal.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from threading import Thread
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_prune import Chat, generate, load, pruned, stream_generate
from mlx_vlm_prune.machine.threads import computing

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
from . import host_folders

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
FAMILIES = ["llava", "qwen2_5_vl", "qwen3_vl"]
HALF = {"pruner": "divprune", "keep_ratio": 0.5}
CAP = {"pruner": "norm", "keep_tokens": 4}
WORDS, LONG = "w7 w9", "w3 w11 w4 w8 w7 w9 w3 w3 w5"
ROOT = Path(__file__).resolve().parents[1]
Query = tuple[str, str | None, dict[str, Any]]
REQUESTS: list[Query] = [
    (WORDS, "a", HALF),
    (LONG, "b", HALF),
    (WORDS, "thumb", CAP),
    (LONG, "a", {}),
    (WORDS, None, {}),
    ("w8", "b", CAP | {"eos_tokens": ["w3", "w5"]}),
    ("w8", "b", CAP),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = host_folders.desk(tmp_path_factory.mktemp("at_once"), FAMILIES)
    host_folders.picture(folder, "thumb.png", 28, 28)
    return folder


@pytest.fixture(scope="module")
def loaded(home):
    return {name: load(home / name) for name in FAMILIES}


def request(home: Path, query: Query) -> dict[str, Any]:
    words, picture, options = query
    image = home / f"{picture}.png" if picture else None
    sampled = {"temperature": 1.5, "seed": len(words)}  # so that each number matters
    return {"prompt": words, "image": image, "max_tokens": 8, **sampled, **options}


@pytest.mark.parametrize("family", FAMILIES)
def test_generators_that_are_read_by_turns_answer_as_alone(home, loaded, family):
    model, processor = loaded[family]
    requests = [request(home, query) for query in REQUESTS]
    alone = [generate(model, processor, **one).token_ids for one in requests]
    assert len({tuple(ids) for ids in alone}) > 4  # so an answer of another's would be seen
    results = read_by_turns([stream_generate(model, processor, **one) for one in requests])
    assert [result.token_ids for result in results] == alone


def read_by_turns(streams: list[Any]) -> list[Any]:
    """The result of each stream, of which a piece is read in every round."""
    results: list[Any] = [None] * len(streams)
    for pieces in zip_longest(*streams):
        for i, piece in enumerate(pieces):
            results[i] = (piece and piece.result) or results[i]
    return results


def test_a_generator_that_is_left_or_closed_disturbs_no_other(home, loaded):
    model, processor = loaded["qwen2_5_vl"]
    one, two = (request(home, query) for query in (REQUESTS[1], REQUESTS[0]))
    alone = generate(model, processor, **one).token_ids
    stream, left = (
        stream_generate(model, processor, **one),
        stream_generate(model, processor, **two),
    )
    ids = [next(stream).token, next(stream).token]
    next(left)
    ids.append(next(stream).token)
    left.close()
    ids += [piece.token for piece in stream]
    assert ids[: len(alone)] == alone


def test_the_limit_of_wired_memory_is_set_back_behind_answers_that_overlap(
    home, loaded, monkeypatch
):
    """mlx-vlm sets it on Metal, for each answer."""
    limits = [7]

    def set_limit(limit: int) -> int:
        limits.append(limit)
        return limits[-2]

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "set_wired_limit", set_limit)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 1 << 40})
    model, processor = loaded["qwen3_vl"]
    first, second = (
        stream_generate(model, processor, **request(home, query)) for query in REQUESTS[:2]
    )
    next(first)
    next(second)
    for _ in first:
        pass
    assert limits[-1] == 1 << 40  # the second goes on
    second.close()
    assert limits[-1] == 7
    generate(model, processor, **request(home, REQUESTS[0]))
    assert limits[-1] == 7


def test_a_processor_of_logits_may_ask_the_same_model(home, loaded):
    model, processor = loaded["qwen3_vl"]
    one, two = (request(home, query) for query in (REQUESTS[1], REQUESTS[0]))
    alone, other = (generate(model, processor, **each).token_ids for each in (one, two))
    answers = []

    def ask(tokens, logits):
        answers.append(generate(model, processor, **two).token_ids)
        return logits

    assert generate(model, processor, **one, logits_processors=[ask]).token_ids == alone
    assert len(answers) >= len(alone) and all(ids == other for ids in answers)


def test_two_chats_about_one_model_do_not_mix(home, loaded):
    model, processor = loaded["qwen2_5_vl"]

    def chats():
        return [Chat(model, processor, max_tokens=5, **HALF) for _ in range(2)]

    turns = (
        [(WORDS, "a.png"), ("w8", None), (LONG, None)],
        [(LONG, "b.png"), (WORDS, None), ("w3", None)],
    )
    alone = [
        [chat.ask(words, image and home / image).token_ids for words, image in turns[i]]
        for i, chat in enumerate(chats())
    ]
    both = chats()
    for n in range(3):
        streams = [
            both[i].stream(turns[i][n][0], turns[i][n][1] and home / turns[i][n][1]) for i in (0, 1)
        ]
        read_by_turns(streams)
        assert [chat.result.token_ids for chat in both] == [alone[0][n], alone[1][n]]


@pytest.mark.parametrize("family", FAMILIES)
def test_in_a_block_mlx_vlms_own_streams_may_be_read_by_turns(home, loaded, family):
    from mlx_vlm import apply_chat_template
    from mlx_vlm import stream_generate as theirs

    model, processor = loaded[family]

    def stream(words: str, picture: str):
        text = apply_chat_template(processor, model.config, words, num_images=1)
        image = str(home / f"{picture}.png")
        for piece in theirs(model, processor, text, image, max_tokens=8, temperature=0.0):
            yield np.array(piece.logprobs)

    query = [(WORDS, "a"), (LONG, "b"), (WORDS, "thumb")]
    with pruned(model, "divprune", keep_tokens=4):
        alone = [np.stack([*stream(*one)]) for one in query]
        rounds = [*zip(*(stream(*one) for one in query), strict=True)]
        by_turns = [np.stack(pieces) for pieces in zip(*rounds, strict=True)]
    np.testing.assert_allclose(by_turns, alone, rtol=0, atol=1e-4)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(alone[i][-1] - alone[j][-1]).max() > 1e-3


def answer_in_threads(home: Path) -> None:
    """Each request of each family in threads, again and again, beside the others."""
    wrong: list[Any] = []
    for family in FAMILIES:
        model, processor = load(home / family)
        requests = [request(home, query) for query in REQUESTS]
        alone = [generate(model, processor, **one).token_ids for one in requests]

        def ask(i: int, model=model, processor=processor, requests=requests, alone=alone) -> None:
            try:
                ids = generate(model, processor, **requests[i]).token_ids
            except Exception as problem:
                ids = repr(problem)
            if ids != alone[i]:
                wrong.append((i, ids, alone[i]))

        waiting = iter([*range(len(requests))] * 3)
        threads = [Thread(target=computing(ask_all), args=(ask, waiting)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if wrong:
        sys.exit(f"{len(wrong)} wrong: {wrong[:3]}")


def ask_all(ask: Callable[[int], None], waiting: Iterator[int]) -> None:
    """A thread's share: whatever no other has taken."""
    for number in waiting:
        ask(number)


def test_threads_answer_as_alone(home):
    code = (
        "import sys; from pathlib import Path; from tests.test_hosts_at_once import *;"
        " answer_in_threads(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(home)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1500:]
