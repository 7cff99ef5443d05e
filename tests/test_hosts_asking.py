"""Promises of an evaluation of mlx-vlm's models: what `generate` says, and the right answers' odds.

Shapes: V words.
"""

import json
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
from mlx_vlm_prune import evaluate, generate, load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.evaluation import host_answers
from mlx_vlm_prune.evaluation.host_answers import HostRespondent, Ready
from mlx_vlm_prune.evaluation.questions import Question
from mlx_vlm_prune.hosts.compatibility import check_pipeline
from mlx_vlm_prune.hosts.families import host_of
from mlx_vlm_prune.hosts.families.llava import LlavaHost
from mlx_vlm_prune.hosts.prefill import HostPrefill, prefill_through_cuts
from mlx_vlm_prune.hosts.prompt import budgets_by_view, encode_images_and_text, prune_prompt
from mlx_vlm_prune.pruners import plan

from . import host_folders
from .host_models import KINDS

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
BEHIND = ("none", "divprune", "avgpool", "received_attention", "cdpruner")
DEEP = [(kind, spec) for kind in ("llava", "qwen2_5_vl", "qwen3_vl") for spec in ("fastv", "vtw")]
CASES = [(kind, spec) for kind in KINDS for spec in BEHIND] + DEEP
RIGHT, WORDS, END = [7, 3, 21, 63], 5, 63
NAMES = ("llava", "qwen2_5_vl")


def respondent(model, *specs: str) -> HostRespondent:
    words = SimpleNamespace(stopping_criteria=SimpleNamespace(eos_token_ids=[END]))
    host = host_of(model, SimpleNamespace(tokenizer=words))
    return HostRespondent(host, [plan(spec) for spec in specs])


def share(spec: str) -> float:
    return {"none": 1.0, "fastv": 0.75, "vtw": 0.75}.get(spec, 0.5)


def by_mlx_vlm(model, inputs, spec: str, forced=()) -> tuple[list[int], float]:
    """Tokens of mlx-vlm's own loop from the prompt on, and the odds of those it was forced to."""
    from mlx_vlm.generate.ar import generate_step

    pipeline, host, coming, odds = plan(spec), host_of(model), [*forced], 0.0

    def choose(odds_1V):
        return mx.array([coming.pop(0)]) if coming else mx.argmax(odds_1V, axis=-1)

    policy = check_pipeline(host, pipeline, None)
    with host.preserve_state():
        views = encode_images_and_text(host, inputs, pipeline)
        budgets = budgets_by_view(views, share(spec), None, pipeline)
        prompt = prune_prompt(host, inputs, views, pipeline, budgets, policy)
        prompt = prefill_through_cuts(host, prompt, pipeline, budgets, policy)
        rest = dict(prompt.arguments) | ({"prompt_cache": prompt.cache} if prompt.cache else {})
        ids, pixels, mask = (rest.pop(x, None) for x in ("input_ids", "pixel_values", "mask"))
        steps = generate_step(ids, model, pixels, mask, max_tokens=WORDS, sampler=choose, **rest)
        said = []
        for i, (token, odds_V) in enumerate(steps):
            odds += odds_V[forced[i]].item() if i < len(forced) else 0.0
            said.append(int(token))
    return said[: said.index(END)] if END in said and not forced else said, odds


@pytest.mark.parametrize(("kind", "spec"), CASES)
def test_it_answers_as_mlx_vlms_own_loop_does_and_finds_the_same_odds(kind, spec):
    model = KINDS[kind].make()
    inputs = KINDS[kind].inputs(model)
    one = respondent(model, spec)
    said = one.answer(one.begin([Ready(inputs, RIGHT)]), plan(spec), share(spec), WORDS)
    assert said.ids == [by_mlx_vlm(model, inputs, spec)[0]]
    assert said.logprob_B == pytest.approx(by_mlx_vlm(model, inputs, spec, RIGHT)[1], abs=1e-4)


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_an_answer_that_went_on_from_the_right_one_would_be_told_apart(kind, monkeypatch):
    model = KINDS[kind].make()
    one, ready = respondent(model, "none"), Ready(KINDS[kind].inputs(model), RIGHT)
    said = one.answer(one.begin([ready]), plan("none"), 1.0, WORDS).ids
    monkeypatch.setattr(HostPrefill, "fork", lambda prefill: prefill)
    assert one.answer(one.begin([ready]), plan("none"), 1.0, WORDS).ids != said


def test_the_tower_works_once_for_all_methods():
    model = KINDS["llava"].make()
    calls, real = [], type(model.vision_tower).__call__

    class Counted(type(model.vision_tower)):
        def __call__(self, *args, **told):
            calls.append(len(args[0]))
            return real(self, *args, **told)

    model.vision_tower.__class__ = Counted
    one = respondent(model, "none", "cls_attention", "divprune", "cdpruner", "tome")
    batch = one.begin([Ready(KINDS["llava"].inputs(model, 1), RIGHT)] * 2)
    for spec in ("none", "cls_attention", "divprune", "cdpruner"):
        one.answer(batch, plan(spec), share(spec), 1)
    assert calls == [1, 1]


# --- the command ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two models, and four questions about two pictures of different sizes."""
    folder = tmp_path_factory.mktemp("asked")
    for name in NAMES:
        host_folders.checkpoint(name, folder)
    host_folders.picture(folder, "a.png", 70, 90)
    host_folders.picture(folder, "b.png", 150, 120)
    rows = [
        {"id": f"q{n}", "image": f"{'ab'[n % 2]}.png", "question": f"w{n + 7} w9", "answer": "w3"}
        for n in range(4)
    ]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def command(home, name: str, out, *more: str) -> list[str]:
    return ["--model", str(home / name), "--questions", str(home / "q.jsonl"), "--out", str(out),
            "--max-tokens", "3", *more]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_table_has_shares_of_images_that_differ_in_size(home, name, tmp_path, capsys):
    out = tmp_path / "e.json"
    specs = [part for spec in ("norm", "fastv", "tome") for part in ("--pruner", spec)]
    evaluate.main(command(home, name, out, "--keep-ratio", "0.75", *specs))
    told, model = json.loads(out.read_text()), load(home / name)
    sizes = [16, 16] if name == "llava" else [6, 20]  # LLaVA's pictures are all made alike
    assert [row["pruner"] for row in told["rows"]] == ["none", "random", "norm", "fastv"]
    for row in told["rows"]:
        kept = [N if row["pruner"] == "none" else N * 3 // 4 for N in sizes]
        assert (row["of"], row["tokens"]) == (sum(sizes) / 2, round(sum(kept) / 2))
        assert np.isfinite(row["logprob"])
    why = told["refused"][0]["why"]
    assert told["refused"][0]["pruner"] == "tome" and "between the tower's layers" in why
    shown = capsys.readouterr().out
    assert "Not asked: tome with 75% of the tokens" in shown and "the mean over all" in shown
    for spec, loyal in (("none", 1.0), ("norm", None)):
        same = [
            generate(*model, f"w{n + 7} w9", image=home / f"{'ab'[n % 2]}.png", pruner=spec,
                     keep_ratio=share(spec) if spec == "none" else 0.75, max_tokens=3).text
            for n in range(4)
        ]  # fmt: skip
        row = next(row for row in told["rows"] if row["pruner"] == spec)
        right = sum(text.strip() == "w3" for text in same) / 4
        assert row["overall"] == right and loyal in (None, row["loyalty"])


def test_tokens_are_taken_as_they_are_and_an_image_that_has_fewer_keeps_all(home, tmp_path, capsys):
    out = tmp_path / "e.json"
    for K, mean in ((4, 4), (7, (6 + 7) / 2)):  # of 6 and 20
        asked = ("--keep-tokens", str(K), "--pruner", "norm")
        evaluate.main(command(home, "qwen2_5_vl", out, *asked))
        rows = json.loads(out.read_text())["rows"]
        assert [(row["tokens"], row["of"]) for row in rows] == [(13, 13), *[(round(mean), 13)] * 2]
        said = f"Of {K} tokens: an image that has fewer keeps all" in capsys.readouterr().out
        assert said is (K == 7) and said is ("keep_tokens" in rows[-1])


@pytest.mark.parametrize("size", ["1", "2"])
def test_what_cannot_be_asked_later_on_is_asked_no_more_and_the_rest_goes_on(
    home, tmp_path, size, capsys
):
    """Of 20 tokens fastv cannot keep 7 in the average layer; of 6 it keeps all."""
    out = tmp_path / "e.json"
    more = ("--keep-tokens", "7", "--pruner", "fastv", "--pruner", "norm", "--batch", size)
    evaluate.main(command(home, "qwen2_5_vl", out, *more))
    told = json.loads(out.read_text())
    assert [row["pruner"] for row in told["rows"]] == ["none", "random", "norm"]
    (one,) = told["refused"]
    assert "cannot keep 7 of 20 visual tokens" in one["why"]
    assert one["why"].startswith("question q1: ") is (size == "1")
    alone = tmp_path / "alone.json"
    evaluate.main(command(home, "qwen2_5_vl", alone, "--keep-tokens", "7", "--pruner", "norm"))
    for row, other in zip(told["rows"], json.loads(alone.read_text())["rows"], strict=True):
        assert row["logprob"] == pytest.approx(other["logprob"], abs=1e-6)
        assert row["overall"] == other["overall"] and row["loyalty"] == other["loyalty"]


def test_a_mark_that_is_no_token_is_passed_over(home):
    model, processor = load(home / "llava")
    config = SimpleNamespace(image_token_index=-200)  # FastVLM's
    assert "<image>" in LlavaHost(SimpleNamespace(config=config), processor).image_marks
    assert host_of(model, processor).image_marks.count("<image>") == 1


def test_an_answer_of_nothing_is_refused_where_no_token_ends_one(home):
    one = HostRespondent(host_of(*load(home / "llava")), [])
    question = Question("q0", "w7 w9", ("",), home / "a.png")
    assert len(one.ready(question).right) == 1
    one.ends = set()
    with pytest.raises(UserError, match="its answer is empty"):
        one.ready(question)


def test_without_names_every_method_that_can_is_asked():
    names = host_answers.usual(host_of(KINDS["llava"].make()))
    assert {"random", "divprune", "cls_attention", "fastv", "vtw"} <= {*names}
    assert not {"tome", "none", "twig", "mlp", "restore", "sparsevlm", "downsample"} & {*names}
    assert "fastv" not in host_answers.usual(host_of(KINDS["gemma3"].make()))
