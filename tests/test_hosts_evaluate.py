"""Evaluation of mlx-vlm's models: the answers and log-probabilities of mlx-vlm's own loop.

Shapes: V words.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
from mlx_vlm_prune import evaluate, generate, load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.evaluation import host_answers
from mlx_vlm_prune.evaluation.host_answers import EvaluatedHost, PreparedHostQuestion
from mlx_vlm_prune.evaluation.questions import Question
from mlx_vlm_prune.hosts.compatibility import check_pipeline
from mlx_vlm_prune.hosts.families import host_of
from mlx_vlm_prune.hosts.families.llava import LlavaHost
from mlx_vlm_prune.hosts.prefill import HostPrefill, prefill_through_cuts
from mlx_vlm_prune.hosts.prompt import ImageBudget, encode_images_and_text, prune_prompt
from mlx_vlm_prune.pruners import plan

from . import host_folders
from .host_models import KINDS

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
BEHIND = ("none", "divprune", "avgpool", "received_attention", "cdpruner")
DEEP = [(kind, spec) for kind in ("llava", "qwen2_5_vl", "qwen3_vl") for spec in ("fastv", "vtw")]
INSIDE = [(kind, "tome") for kind in ("llava", "idefics3", "qwen2_5_vl", "qwen3_vl")]
CASES = [(kind, spec) for kind in KINDS for spec in BEHIND] + DEEP + INSIDE
RIGHT_IDS, MAX_TOKENS, END = [7, 3, 21, 63], 5, 63
NAMES = ("llava", "qwen2_5_vl")


def evaluated(model, *specs: str) -> EvaluatedHost:
    tokenizer = SimpleNamespace(stopping_criteria=SimpleNamespace(eos_token_ids=[END]))
    host = host_of(model, SimpleNamespace(tokenizer=tokenizer))
    return EvaluatedHost(host, [plan(spec) for spec in specs])


def keep_ratio(spec: str) -> float:
    return {"none": 1.0, "fastv": 0.75, "vtw": 0.75}.get(spec, 0.5)


def by_mlx_vlm(model, inputs, spec: str, forced=()) -> tuple[list[int], float]:
    """The tokens of mlx-vlm's own loop, and the log-probability of those it was forced to."""
    from mlx_vlm.generate.ar import generate_step

    pipeline, host, left, logprob = plan(spec), host_of(model), [*forced], 0.0

    def sampler(logprob_1V):
        return mx.array([left.pop(0)]) if left else mx.argmax(logprob_1V, axis=-1)

    policy = check_pipeline(host, pipeline, None)
    by_view = ImageBudget(keep_ratio(spec)).by_view(pipeline)
    with host.preserve_state():
        views = encode_images_and_text(host, inputs, pipeline, by_view)
        budgets = by_view(views)
        prompt = prune_prompt(host, inputs, views, pipeline, budgets, policy)
        prompt = prefill_through_cuts(host, prompt, pipeline, budgets, policy)
        rest = dict(prompt.arguments) | ({"prompt_cache": prompt.cache} if prompt.cache else {})
        ids, pixels, mask = (rest.pop(x, None) for x in ("input_ids", "pixel_values", "mask"))
        steps = generate_step(
            ids, model, pixels, mask, max_tokens=MAX_TOKENS, sampler=sampler, **rest
        )
        tokens = []
        for i, (token, logprob_V) in enumerate(steps):
            logprob += logprob_V[forced[i]].item() if i < len(forced) else 0.0
            tokens.append(int(token))
    return tokens[: tokens.index(END)] if END in tokens and not forced else tokens, logprob


@pytest.mark.parametrize(("kind", "spec"), CASES)
def test_answers_and_log_probabilities_are_those_of_mlx_vlms_own_loop(kind, spec):
    model = KINDS[kind].make()
    inputs = KINDS[kind].inputs(model)
    host = evaluated(model, spec)
    batch = host.make_batch([PreparedHostQuestion(inputs, RIGHT_IDS)])
    answers = host.answer(batch, plan(spec), keep_ratio(spec), MAX_TOKENS)
    assert answers.ids == [by_mlx_vlm(model, inputs, spec)[0]]
    logprob = by_mlx_vlm(model, inputs, spec, RIGHT_IDS)[1]
    assert answers.logprob_B == pytest.approx(logprob, abs=1e-4)


@pytest.mark.parametrize("kind, specs", [("qwen2_5_vl", ("norm", "fastv")), ("llava", ("fastv",))])
def test_positions_that_count_on_give_other_answers(kind, specs):
    model = KINDS[kind].make()
    host = evaluated(model, *specs)
    batch = host.make_batch([PreparedHostQuestion(KINDS[kind].inputs(model, 1), RIGHT_IDS)])
    for spec in specs:
        logprobs = [
            host.answer(batch, replace(plan(spec), policy=policy), 0.75, 1).logprob_B.tolist()
            for policy in (None, "keep", "renumber")
        ]
        assert logprobs[0] == logprobs[1] != logprobs[2]


def test_positions_that_a_host_counts_cannot_be_kept():
    model = KINDS["llava"].make()
    host = evaluated(model, "norm")
    batch = host.make_batch([PreparedHostQuestion(KINDS["llava"].inputs(model, 1), RIGHT_IDS)])
    with pytest.raises(UserError, match="it counts the rows it is given"):
        host.answer(batch, replace(plan("norm"), policy="keep"), 0.5, 1)


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_an_answer_after_the_right_one_would_differ(kind, monkeypatch):
    model = KINDS[kind].make()
    host = evaluated(model, "none")
    prepared = PreparedHostQuestion(KINDS[kind].inputs(model), RIGHT_IDS)
    ids = host.answer(host.make_batch([prepared]), plan("none"), 1.0, MAX_TOKENS).ids
    monkeypatch.setattr(HostPrefill, "fork", lambda prefill: prefill)
    assert host.answer(host.make_batch([prepared]), plan("none"), 1.0, MAX_TOKENS).ids != ids


def test_the_tower_runs_once_for_all_methods():
    model = KINDS["llava"].make()
    calls, real = [], type(model.vision_tower).__call__

    class Counted(type(model.vision_tower)):
        def __call__(self, *args, **options):
            calls.append(len(args[0]))
            return real(self, *args, **options)

    model.vision_tower.__class__ = Counted
    host = evaluated(model, "none", "cls_attention", "divprune", "cdpruner", "tome")
    prepared = PreparedHostQuestion(KINDS["llava"].inputs(model, 1), RIGHT_IDS)
    batch = host.make_batch([prepared] * 2)
    for spec in ("none", "cls_attention", "divprune", "cdpruner"):
        host.answer(batch, plan(spec), keep_ratio(spec), 1)
    assert calls == [1, 1]


# --- the command ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two models, and four questions about two pictures of different sizes."""
    folder = tmp_path_factory.mktemp("home")
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
    specs = [
        part for spec in ("norm", "kq_norm", "fastv", "downsample") for part in ("--pruner", spec)
    ]
    evaluate.main(command(home, name, out, "--keep-ratio", "0.75", *specs))
    result, model = json.loads(out.read_text()), load(home / name)
    sizes = [16, 16] if name == "llava" else [6, 20]  # LLaVA's pictures are all made alike
    assert [row["pruner"] for row in result["rows"]] == [
        "none",
        "random",
        "norm",
        "kq_norm",
        "fastv",
    ]
    for row in result["rows"]:
        kept = [N if row["pruner"] == "none" else N * 3 // 4 for N in sizes]
        assert (row["of"], row["tokens"]) == (sum(sizes) / 2, round(sum(kept) / 2))
        assert np.isfinite(row["logprob"])
    why = result["refused"][0]["why"]
    assert result["refused"][0]["pruner"] == "downsample" and "the pixels fewer" in why
    shown = capsys.readouterr().out
    assert "Not asked: downsample with 75% of the tokens" in shown and "the mean over all" in shown
    for spec, loyal in (("none", 1.0), ("norm", None), ("kq_norm", None)):
        same = [
            generate(*model, f"w{n + 7} w9", image=home / f"{'ab'[n % 2]}.png", pruner=spec,
                     keep_ratio=keep_ratio(spec) if spec == "none" else 0.75, max_tokens=3).text
            for n in range(4)
        ]  # fmt: skip
        row = next(row for row in result["rows"] if row["pruner"] == spec)
        right = sum(text.strip() == "w3" for text in same) / 4
        assert row["overall"] == right and loyal in (None, row["loyalty"])


def test_a_budget_in_tokens_keeps_all_of_an_image_that_has_fewer(home, tmp_path, capsys):
    out = tmp_path / "e.json"
    for K, mean in ((4, 4), (7, (6 + 7) / 2)):  # of 6 and 20
        options = ("--keep-tokens", str(K), "--pruner", "norm")
        evaluate.main(command(home, "qwen2_5_vl", out, *options))
        rows = json.loads(out.read_text())["rows"]
        assert [(row["tokens"], row["of"]) for row in rows] == [(13, 13), *[(round(mean), 13)] * 2]
        has_note = f"Of {K} tokens: an image that has fewer keeps all" in capsys.readouterr().out
        assert has_note is (K == 7) and has_note is ("keep_tokens" in rows[-1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("K", [0.5, 7])
def test_a_question_about_two_images_is_asked_as_generate_asks_it(home, name, K):
    model, processor = load(home / name)
    several = Question("1", "w7 w9", ("w3",), home / "a.png", more_images=(home / "b.png",))
    host, pipeline = EvaluatedHost(host_of(model, processor), [plan("norm")]), plan("norm")
    batch = host.make_batch([host.prepare(several)])
    assert batch.sizes == ([16, 16] if name == "llava" else [6, 20])
    (ids,) = host.answer(batch, pipeline, K, MAX_TOKENS).ids
    if K == 0.5:
        images = [several.image, *several.more_images]
        result = generate(model, processor, several.text, image=images, pruner="norm",
                          keep_ratio=K, max_tokens=MAX_TOKENS)  # fmt: skip
        assert ids == [token for token in result.token_ids if token not in host.ends]


@pytest.mark.parametrize("name", NAMES)
def test_questions_without_right_answers_are_asked_and_their_answers_written(home, name, tmp_path):
    lines = [{"question_id": n, "image": f"{'ab'[n]}.png", "text": "w7 w9"} for n in range(2)]
    path, out = home / "llava_test.jsonl", tmp_path / "e.json"
    path.write_text("\n".join(map(json.dumps, lines)))
    argv = command(home, name, out, "--keep-ratio", "0.75", "--pruner", "norm")
    argv[argv.index("--questions") + 1] = str(path)
    evaluate.main([*argv, "--format", "llava-eval"])
    rows = json.loads(out.read_text())["rows"]
    assert [set(row) & {"overall", "logprob", "loyalty"} for row in rows] == [{"loyalty"}] * 3
    written = (tmp_path / "e-answers" / "norm-0.75.jsonl").read_text().splitlines()
    assert [json.loads(line)["question_id"] for line in written] == [0, 1]


@pytest.mark.parametrize("size", ["1", "2"])
def test_a_method_that_fails_later_on_is_not_asked_again_and_the_others_are(
    home, tmp_path, size, capsys
):
    """Of 20 tokens fastv cannot keep 7 in the average layer; of 6 it keeps all."""
    out = tmp_path / "e.json"
    more = ("--keep-tokens", "7", "--pruner", "fastv", "--pruner", "norm", "--batch", size)
    evaluate.main(command(home, "qwen2_5_vl", out, *more))
    result = json.loads(out.read_text())
    assert [row["pruner"] for row in result["rows"]] == ["none", "random", "norm"]
    (refusal,) = result["refused"]
    assert "cannot keep 7 of 20 visual tokens" in refusal["why"]
    assert refusal["why"].startswith("question q1: ") is (size == "1")
    alone = tmp_path / "alone.json"
    evaluate.main(command(home, "qwen2_5_vl", alone, "--keep-tokens", "7", "--pruner", "norm"))
    for row, other in zip(result["rows"], json.loads(alone.read_text())["rows"], strict=True):
        assert row["logprob"] == pytest.approx(other["logprob"], abs=1e-6)
        assert row["overall"] == other["overall"] and row["loyalty"] == other["loyalty"]


def test_a_model_of_mlx_vlms_cannot_draft(home, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(command(home, "llava", tmp_path / "e.json", "--num-draft-tokens", "5"))
    assert stop.value.code == 2
    assert "--num-draft-tokens needs a twig, and a model of mlx-vlm's" in capsys.readouterr().err


def test_first_tokens_are_those_of_single_requests(home, tmp_path):
    out = tmp_path / "e.json"
    more = ("--keep-tokens", "7", "--pruner", "norm", "--pruner", "vtw", "--first-token", "2")
    evaluate.main(command(home, "qwen2_5_vl", out, *more))
    for row in json.loads(out.read_text())["rows"]:  # an image of 6 tokens keeps all
        parts = {"image", "pruner", "total", "p10", "p90"}
        parts |= {"vision", "prefill"} if row["pruner"] != "none" else set()  # computed in one go
        assert row["first_token_ms"].keys() == parts


def test_an_image_mark_that_is_no_token_is_left_out(home):
    model, processor = load(home / "llava")
    config = SimpleNamespace(image_token_index=-200)  # FastVLM's
    assert "<image>" in LlavaHost(SimpleNamespace(config=config), processor).image_marks
    assert host_of(model, processor).image_marks.count("<image>") == 1


def test_an_empty_answer_is_refused_where_the_tokenizer_has_no_end_token(home):
    host = EvaluatedHost(host_of(*load(home / "llava")), [])
    question = Question("q0", "w7 w9", ("",), home / "a.png")
    assert len(host.prepare(question).right_ids) == 1
    host.ends = set()
    with pytest.raises(UserError, match="its answer is empty"):
        host.prepare(question)


def test_the_default_methods_are_those_that_can_prune_the_model():
    names = host_answers.default_methods(host_of(KINDS["llava"].make()))
    assert {"random", "divprune", "cls_attention", "fastv", "vtw", "divprune+restore"} <= {*names}
    assert "none+restore" not in names
    assert {"tome", "kq_norm", "patch_norm", "tome+restore"} <= {*names}
    assert not {"none", "twig", "mlp", "restore", "downsample"} & {*names}
    assert {"sparsevlm", "pact"} <= {*names}
    assert not {"fastv", "tome"} & {*host_answers.default_methods(host_of(KINDS["pixtral"].make()))}
    refusing = host_answers.default_methods(host_of(KINDS["paligemma"].make()))
    assert "divprune" in refusing and "divprune+restore" not in refusing


def test_each_method_reads_the_layer_it_asks_for():
    model = KINDS["llava"].make()
    inputs = KINDS["llava"].inputs(model, 1)
    specs = [f"cls_attention:layer={layer}" for layer in (0, 1, 2)]
    host = evaluated(model, *specs)
    batch = host.make_batch([PreparedHostQuestion(inputs, RIGHT_IDS)])
    answers = [host.answer(batch, plan(spec), 0.5, MAX_TOKENS).logprob_B for spec in specs]
    logprobs = [by_mlx_vlm(model, inputs, spec, RIGHT_IDS)[1] for spec in specs]
    np.testing.assert_allclose(np.concatenate(answers), logprobs, atol=1e-4)
    assert len({round(logprob, 3) for logprob in logprobs}) == 3
