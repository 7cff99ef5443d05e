"""`auto`: its choice by an evaluation, by the published order and by calibrations."""

import json
import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from benchmarks.auto_tables import shipped_evaluation
from benchmarks.command_line import RESULTS
from benchmarks.report import fill
from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.auto import facts_of
from mlx_vlm_prune.machine.hardware import environment
from mlx_vlm_prune.machine.remembered import remember
from mlx_vlm_prune.machine.user_cache import cache_folder, model_key
from mlx_vlm_prune.pruners import AUTO, METHODS, check_names, plan
from mlx_vlm_prune.pruners.auto import ModelFacts, choose
from mlx_vlm_prune.pruners.auto.choice import works_in_tower
from mlx_vlm_prune.pruners.auto.evidence import BASELINES, Evidence
from mlx_vlm_prune.pruners.auto.reasons import CAUTIOUS, PUBLISHED
from mlx_vlm_prune.pruners.listing import main as list_pruners
from mlx_vlm_prune.scenes import CHECKPOINT, EVALUATION

from . import tiny

ROOT = Path(__file__).resolve().parents[1]


def row(pruner: str, tokens: int, overall: float) -> dict:
    return {"pruner": pruner, "tokens": tokens, "of": 100, "overall": overall}


ROWS = [
    row("none", 100, 0.99),
    row("random", 50, 0.90), row("random", 10, 0.50),
    row("downsample", 50, 0.80), row("downsample", 10, 0.60),
    row("a", 50, 0.97), row("a", 10, 0.55),  # below a smaller picture at 10
    row("b", 50, 0.95), row("b", 10, 0.70),
    row("c", 50, 0.953), row("c", 10, 0.61),
    row("d", 50, 0.89),  # below random
]  # fmt: skip


def evaluation(rows=ROWS, count=2004) -> dict:
    return {"questions": "mine", "question_set": "0123", "count": count, "date": "2026-11-27T1",
            "rows": rows}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_real_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_VLM_PRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mlx_vlm_prune.pruners.auto.choice.on_cuda", lambda: False)


@pytest.fixture
def folder(tmp_path):
    """A model's folder, as far as its key needs it."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def facts(folder=None, has_cls=True, layers=32, kind="llava", N=None, can=None) -> ModelFacts:
    return ModelFacts(kind, folder, has_cls, layers, N, can or (lambda spec, share: True))


def calibration(folder, pruner, *ms_by_share) -> None:
    """A calibration's file: of each share of 100 tokens, its milliseconds."""
    runs = [
        {"K": int(100 * share), "text": 8, "images": 1, "ms": {"vision": 1.0, "prefill": ms - 1.0}}
        for share, ms in ms_by_share
    ]
    about = environment(mx.float16)
    file = cache_folder() / "calibrations" / f"{model_key(folder)}-{pruner}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": 1, "about": about, "pruner": pruner, "N": 100, "runs": runs}
    file.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def scenes():
    return load()


@pytest.mark.parametrize("K", [98, 49, 22])
def test_on_the_built_in_model_it_is_within_a_point_of_the_best_and_above_all_baselines(scenes, K):
    """Against the committed results; what it may choose is what the model can do, training-free."""
    rows = json.loads((RESULTS / "scenes.json").read_text())["rows"]
    figures = {row["pruner"]: row["overall"] for row in rows if row["tokens"] == K}
    known = facts_of(*scenes)
    learned = {name for name, method in METHODS.items() if method.learned}
    free = [
        name for name in figures
        if not learned & {part.partition(":")[0] for part in name.split("+")}
        and known.can(name, K / 196)
    ]  # fmt: skip
    assert len(free) > 30
    choice = choose(known, None, K)
    assert choice.keep_tokens == K and choice.keep_ratio is None
    assert figures[choice.pruner] >= max(figures[name] for name in free) - 0.01
    assert all(figures[choice.pruner] >= figures.get(name, 0) for name in BASELINES)
    assert f"{figures[choice.pruner]:.1%} right" in choice.line
    assert "(scenes, 2,004 questions, 2026-" in choice.line


def test_what_the_package_ships_is_made_of_the_committed_results():
    assert EVALUATION.read_text(encoding="utf-8") == shipped_evaluation(RESULTS)
    assert json.loads(EVALUATION.read_text())["model_key"] == model_key(CHECKPOINT)


def test_a_method_below_a_baseline_at_a_neighbouring_budget_is_out():
    evidence = Evidence.of(evaluation())
    assert [name for name, _ in evidence.ranked(0.5)] == ["a", "c", "b", "random"]
    assert [name for name, _ in evidence.ranked(0.1)] == ["b", "c", "downsample"]
    assert [name for name, _ in evidence.ranked(0.2)] == ["b", "c"]  # between both
    assert dict(evidence.ranked(0.2))["b"] == pytest.approx(0.7 + 0.25 * 0.43068, abs=1e-5)
    assert evidence.ranked(0.01) == evidence.ranked(0.1)  # the nearest
    assert evidence.ranked(0.9) == evidence.ranked(0.5)


def test_by_an_evaluation_the_best_is_taken_and_of_those_alike_the_best_over_all_budgets(folder):
    remember(folder, evaluation())
    known = facts(folder, N=100)
    assert choose(known, 0.5, None).pruner == "a"
    assert choose(known, None, 10).pruner == "b"
    without_a = replace(known, can=lambda spec, share: spec != "a")
    choice = choose(without_a, 0.5, None)  # c is 0.3 points above b, which is better at 10
    assert choice.pruner == "b"
    assert choice.line == (
        "auto: b: 95.0% right with 0.5 of the tokens in the evaluation of this model (mine, 2,004"
        " questions, 2026-11-27), all tokens 99.0%, random 90.0%"
    )
    assert "with 0.1 of the tokens, the nearest to 0.03 in" in choose(known, 0.03, None).line
    assert "with 0.3 of the tokens (between 0.1 and 0.5) in" in choose(known, 0.3, None).line


def test_the_largest_evaluation_holds_and_one_that_says_nothing_does_not(folder):
    remember(folder, evaluation(count=19))
    assert "by the published order" in choose(facts(folder), 0.5, None).line
    remember(folder, evaluation([ROWS[0] | {"overall": 0.0}, *ROWS[1:]], 21))
    assert "by the published order" in choose(facts(folder), 0.5, None).line
    other = [ROWS[0], row("random", 50, 0.5), *(row(name, 50, 0.9) for name in "efg")]
    remember(folder, evaluation(other, 60) | {"question_set": "4567"})
    assert choose(facts(folder), 0.5, None).pruner == "e"
    remember(folder, evaluation(count=100))
    assert choose(facts(folder), 0.5, None).pruner == "a"
    for path in (cache_folder() / "evaluations").iterdir():
        path.write_text('{"rows": [{"pruner": 1}]}')
    assert "by the published order" in choose(facts(folder), 0.5, None).line


def test_an_evaluation_of_few_methods_does_not_replace_the_order(folder):
    """What `evaluate --pruner auto` writes: a row of what was chosen, and baselines."""
    chosen = row("auto", 50, 0.97) | {"chosen": "a"}
    remember(folder, evaluation([*ROWS[:5], chosen]))
    assert "by the published order" in choose(facts(folder), 0.5, None).line
    remember(folder, evaluation([*ROWS[:5], chosen, row("b", 50, 0.95), row("c", 50, 0.9)]))
    assert choose(facts(folder), 0.5, None).line.startswith("auto: a: 97.0% right")


def test_a_calibration_decides_among_those_alike_and_nothing_is_pruned_without_a_gain(folder):
    remember(folder, evaluation())
    known = facts(folder, N=100, can=lambda spec, share: spec in ("b", "c"))
    assert choose(known, 0.5, None).pruner == "b"
    calibration(folder, "c", (0.1, 20.0), (0.5, 60.0), (1.0, 100.0))
    choice = choose(known, 0.5, None)
    assert choice.pruner == "c" and "the first token takes 60% of its time" in choice.line
    calibration(folder, "b", (0.1, 20.0), (0.5, 50.0), (1.0, 100.0))
    assert choose(known, 0.5, None).pruner == "b"
    calibration(folder, "b", (0.1, 120.0), (0.5, 150.0), (1.0, 100.0))
    assert choose(known, 0.5, None).pruner == "c"
    calibration(folder, "c", (0.1, 90.0), (0.5, 110.0), (1.0, 100.0))
    calibration(folder, "norm", (0.5, 70.0), (1.0, 100.0))  # which is no candidate
    choice = choose(known, 0.5, None)
    assert (choice.pruner, choice.keep_ratio, choice.keep_tokens) == ("none", None, None)
    assert "nothing is gained: by the calibrations of this machine" in choice.line
    assert "takes 110% of its time with 0.5 of the tokens (c)" in choice.line
    assert choose(known, 0.5, None, is_timed=False).pruner == "b"
    (cache_folder() / "calibrations" / f"{model_key(folder)}-c.json").write_text("{")
    assert choose(known, 0.5, None).pruner == "c"  # whose time is not known


def test_a_calibration_of_another_machine_or_dtype_says_nothing(folder):
    remember(folder, evaluation())
    calibration(folder, "a", (0.5, 150.0), (1.0, 100.0))  # in float16
    assert choose(replace(facts(folder), dtype=mx.float16), 0.5, None).pruner != "a"
    assert choose(replace(facts(folder), dtype=mx.float32), 0.5, None).pruner == "a"
    assert choose(facts(folder), 0.5, None).pruner != "a"
    (file,) = (cache_folder() / "calibrations").iterdir()
    content = json.loads(file.read_text())
    content["about"]["machine"]["cpu"] = "another"
    file.write_text(json.dumps(content))
    assert choose(facts(folder), 0.5, None).pruner == "a"


def test_a_file_is_read_once_until_it_changes(folder, monkeypatch):
    remember(folder, evaluation())
    choose(facts(folder), 0.5, None)
    with monkeypatch.context() as patch:
        patch.setattr("mlx_vlm_prune.pruners.auto.evidence.read_json", None)
        assert choose(facts(folder), 0.5, None).pruner == "a"
    remember(folder, evaluation([row for row in ROWS if row["pruner"] != "a"], 3000))
    assert choose(facts(folder), 0.5, None).pruner == "b"


ORDER = {
    "CLIP in LLaVA": (facts(), "scope+restore"),
    "where no row gets more attention": (
        facts(can=lambda spec, share: "restore" not in spec), "scope"),
    "deep, without coverage": (
        facts(can=lambda spec, share: "scope" not in spec), "vscan"),
    "shallow, without coverage": (
        facts(layers=4, can=lambda spec, share: "scope" not in spec), "divprune+restore"),
    "Qwen": (facts(has_cls=False, kind="qwen2_5_vl"), "divprune+restore"),
    "no attention in the tower": (facts(has_cls=False, kind="fastvlm"), "divprune+restore"),
    "PaliGemma": (
        facts(has_cls=False, kind="paligemma", can=lambda spec, share: "restore" not in spec),
        "divprune"),
    "nothing works": (facts(can=lambda spec, share: False), "none"),
}  # fmt: skip


@pytest.mark.parametrize("case", ORDER)
def test_without_evidence_it_goes_by_the_published_order(case):
    known, pruner = ORDER[case]
    choice = choose(known, 0.25, None)
    assert choice.pruner == pruner
    if pruner == "none":
        assert "no method of the published order works in this model" in choice.line
    else:
        start = f"by the published order, since no evaluation of this {known.kind} model is known"
        assert choice.why.startswith(start) and choice.keep_ratio == 0.25
        assert "keeps 91.8 %" in choice.line or case != "Qwen"


def test_on_a_cuda_gpu_the_order_takes_a_quick_choice_where_one_was_measured(folder, monkeypatch):
    monkeypatch.setattr("mlx_vlm_prune.pruners.auto.choice.on_cuda", lambda: True)
    known = facts(folder, N=100)
    assert choose(known, 0.25, None).pruner == "cls_attention"
    assert choose(replace(known, has_cls=False), 0.25, None).pruner == "divprune+restore"
    assert works_in_tower(choose(known, 0.25, None, in_tower=True).pruner)
    calibration(folder, "cls_attention", (0.1, 120.0), (0.5, 150.0), (1.0, 100.0))
    assert choose(known, 0.25, None).pruner == "scope+restore"
    remember(folder, evaluation())  # which holds on every device
    assert choose(known, 0.5, None).pruner == "a"


def test_of_methods_in_the_tower_one_is_chosen_where_that_is_needed():
    choice = choose(facts(), 0.25, None, in_tower=True)
    assert plan(choice.pruner).budgets(576, 64).handed_on == [432, 64]
    assert works_in_tower(choice.pruner) and not works_in_tower(choose(facts(), 0.25, None).pruner)
    assert works_in_tower("downsample") and not works_in_tower("vscan")


def test_every_line_of_the_table_has_a_source_and_a_method_that_exists():
    for line in PUBLISHED:
        plan(line.pruner)
        assert re.search(r"arXiv:\d{4}\.\d{5}|github\.com/|benchmarks/results", line.source)
        assert line.why
    for subject in CAUTIOUS:
        assert re.search(r"arXiv:|github\.com/|benchmarks/results", subject.source)
        assert all(re.compile(word) for word in subject.words)


def test_all_tokens_or_a_wrong_budget():
    known = facts(N=100)
    for budget in ((1.0, None), (None, 100), (None, 200)):
        choice = choose(known, *budget)
        assert (choice.pruner, choice.keep_tokens) == ("none", None)
        assert "all visual tokens stay" in choice.line
    assert choose(known, None, None).keep_ratio == 0.5
    for budget in ((0.0, None), (None, 0), (0.5, 5)):
        with pytest.raises(UserError):
            choose(known, *budget)


def test_an_image_may_have_more_tokens_than_those_that_were_evaluated(folder):
    remember(folder, evaluation())  # with 100 each
    calibration(folder, "a", (0.5, 60.0), (1.0, 100.0))
    choice = choose(facts(folder), None, 300)
    assert (choice.pruner, choice.keep_tokens) == ("a", 300)
    assert "with 0.5 of the tokens in the evaluation" in choice.line
    assert choose(facts(folder, N=100), None, 300).pruner == "none"


def test_it_is_a_name_but_no_method():
    check_names([AUTO])
    with pytest.raises(UserError, match="auto chooses a method by itself"):
        plan(AUTO)
    with pytest.raises(UserError, match="auto chooses a method by itself"):
        plan("tome+auto")


def test_the_listing_and_the_page_show_the_table(capsys):
    list_pruners([AUTO])
    out = " ".join(capsys.readouterr().out.split())
    for line in PUBLISHED:
        assert f"{line.pruner} ({line.models}): {line.why}. Source: {line.source}." in out
    for subject in CAUTIOUS:
        assert subject.why in out
    list_pruners([])
    assert "auto is no method: it chooses one" in capsys.readouterr().out
    page = ROOT / "docs/auto.md"
    assert page.read_text(encoding="utf-8") == fill(page.read_text(encoding="utf-8"))
    assert all(line.why in page.read_text(encoding="utf-8") for line in PUBLISHED)


def test_a_model_of_other_weights_has_no_evidence_and_is_said_to_have_none(tmp_path):
    tiny.checkpoint(tiny.reference(), tmp_path)
    model, processor = load(tmp_path / "mlx", dtype="float32")
    known = facts_of(model, processor)
    assert (known.N, known.has_cls, known.layers) == (tiny.N, True, tiny.TEXT.num_hidden_layers)
    assert not known.can("fastv", 0.25) and not known.can("mlp", 0.5) and known.can("fastv", 0.5)
    choice = choose(known, 0.25, None)
    assert choice.pruner == "scope+restore" and "by the published order" in choice.line
