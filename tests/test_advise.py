"""The advice: its figures, its frontier, and one recommendation that can be copied."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.advise import Advice, Times, advise, frontier, load_evaluation, main
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.machine.remembered import remember, remembered
from mlx_vlm_prune.machine.user_cache import model_key

from . import tiny


def row(pruner: str, tokens: int, overall: float) -> dict:
    lost = [overall - 0.99, overall - 0.992, overall - 0.985]
    return {"pruner": pruner, "tokens": tokens, "of": 196, "overall": overall,
            "to_full": {"overall": lost}}  # fmt: skip


ROWS = [
    row("none", 196, 0.99), row("fastv", 98, 0.985), row("random", 98, 0.93),
    row("uniform", 49, 0.9), row("random", 49, 0.8), row("divprune", 49, 0.975),
    row("norm", 22, 0.4), row("scope", 22, 0.93),
]  # fmt: skip
TIMES = Times(10.0, 60.0, 30.0, 5.0, {"behind": 80.0, "inside": 50.0, "smaller": 25.0})


def advice(rows=(), times=TIMES, model="my-model") -> Advice:
    edge, size = list(frontier(rows)), (4_000_000, 1_500_000)
    count = 2004 if rows else 0
    return Advice(model, 196, 49, times, size, edge, "scenes", count, "2026-11-27T14:03:59+01:00")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny.checkpoint(tiny.reference(), folder)
    return folder


@pytest.fixture(autouse=True)
def _no_real_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_VLM_PRUNE_CACHE", str(tmp_path / "cache"))


def test_no_row_of_the_frontier_is_beaten_with_as_few_tokens():
    assert [(r["pruner"], r["tokens"]) for r in frontier(ROWS)] == [
        ("fastv", 98), ("divprune", 49), ("scope", 22),
    ]  # fmt: skip
    worse_with_more = [row("a", 98, 0.8), row("b", 49, 0.9), row("c", 22, 0.9)]
    assert [r["pruner"] for r in frontier(worse_with_more)] == ["c"]
    assert frontier([ROWS[0]]) == []


def test_the_lines_have_shares_speedups_and_bounds_worked_by_hand():
    text = "\n".join(advice(ROWS).lines)
    assert "100 ms to the first token, 5.0 ms for each further one" in text
    assert "opening the image takes 10%, the vision tower 60%, projector and prompt 30%" in text
    assert "keeps 49 tokens should make the first token 1.25 x as fast" in text  # 100 / 80
    assert "with no token left it would be 1.43 x" in text  # 100 / (10 + 60)
    assert "(tome) it should be 2.00 x" in text
    assert "(downsample) 4.00 x" in text
    assert "4.0 MB, with 49 tokens 1.5 MB" in text
    assert (
        "In the evaluation of 2026-11-27 14:03 (scenes, 2004 questions) no method was both more"
        " often right and left fewer tokens than these (percentage points beside all tokens): fastv"
        " with 98 (-0.5 points); divprune with 49 (-1.5 points)"
    ) in text
    assert len(advice(ROWS).lines) <= 10


def test_the_recommendation_is_the_fewest_tokens_that_lose_at_most_two_points():
    assert advice(ROWS).recommendation == (
        "Advice: mlx-vlm-prune generate --model my-model --image photo.jpg"
        " --prompt '…' --pruner divprune --keep-tokens 49"
    )
    assert "--model" not in advice(ROWS, model="scenes").recommendation


def test_without_a_speedup_or_with_a_large_loss_the_advice_is_not_to_prune():
    slow = Times(10.0, 60.0, 30.0, 5.0, {"behind": 99.0, "inside": 98.0, "smaller": 97.0})
    at_best = "Advice: do not prune; at best it would be 1.02 x as fast here."
    assert advice(ROWS, slow).recommendation == at_best
    slow.first["smaller"] = 50.0
    for way in ("downsample", "--resize-shape"):  # of a model of ours, of mlx-vlm's
        smaller = f" Only a smaller image ({way}) should gain."
        assert advice(ROWS, slow).recommendation == at_best + smaller
        at_best = at_best.replace("1.02", "1.01")
        slow.first.pop("inside", None)
    lossy = [row("norm", 98, 0.9), row("norm", 49, 0.8)]
    assert "every method may lose more than 2%" in advice(lossy).recommendation
    unsure = row("uniform", 49, 0.98)
    unsure["to_full"]["overall"] = [-0.01, -0.03, 0.01]
    assert "every method may lose more than 2%" in advice([unsure]).recommendation


@pytest.mark.parametrize(
    ("fields", "why"), [({"count": 19}, "only 19 questions"), ({"full": 0.0}, "no right answer")]
)
def test_an_evaluation_of_few_questions_or_no_right_answer_gives_no_advice(fields, why):
    advised = replace(advice(ROWS), **fields).recommendation
    assert advised == f"Advice: evaluate again; with {why} the largest one says nothing."


def test_without_an_evaluation_the_lines_name_the_command_for_one():
    lines = advice().lines
    assert any("mlx-vlm-prune evaluate --model my-model" in line for line in lines)
    assert "evaluate first" in lines[-1]


@pytest.mark.parametrize("spec", ["random", "random:seed=1"])
def test_random_is_never_recommended_and_nothing_below_it(spec):
    best = row(spec, 22, 0.989)
    assert advice([*ROWS, best]).recommendation == advice(ROWS).recommendation
    below = row("norm", 30, 0.985) | {"to_random": {"overall": [-0.02, -0.03, -0.01]}}
    assert advice([*ROWS, below]).recommendation == advice(ROWS).recommendation
    above = row("norm", 30, 0.985) | {"to_random": {"overall": [0.02, 0.01, 0.03]}}
    assert "--pruner norm --keep-tokens 30" in advice([*ROWS, above]).recommendation
    alone = advice([best])
    assert "no method is better than random" in "\n".join(alone.lines)
    assert alone.recommendation.startswith("Advice: do not prune")


def evaluated(count: int, rows=ROWS, questions: str = "one") -> dict:
    return {"questions": questions, "question_set": questions, "count": count, "rows": rows,
            "date": f"2026-11-{count % 28 + 1:02}T10:00:00+00:00"}  # fmt: skip


def test_the_largest_evaluation_of_this_very_model_is_kept_and_found(home, tmp_path):
    assert load_evaluation(home / "mlx", None) == {}
    remember(home / "mlx", evaluated(300))
    remember(home / "mlx", evaluated(4))  # a look at four questions
    remember(home / "mlx", evaluated(300, ROWS[:3]))
    assert load_evaluation(home / "mlx", None) == evaluated(300)
    remember(home / "mlx", evaluated(200, questions="other"))
    assert load_evaluation(home / "mlx", None)["questions"] == "one"
    assert len(remembered(home / "mlx")) == 2
    remember(home / "mlx", evaluated(400, ROWS[:3], "other"))
    assert load_evaluation(home / "mlx", None)["count"] == 400
    remember(home / "mlx", evaluated(301))
    assert evaluated(301) in [json.loads(path.read_text()) for path in remembered(home / "mlx")]
    for path in remembered(home / "mlx"):
        path.write_text("cut off")
    remember(home / "mlx", evaluated(4))
    assert evaluated(4) in [read for path in remembered(home / "mlx") if (read := readable(path))]


def readable(path) -> dict:
    text = path.read_text()
    return json.loads(text) if text.startswith("{") else {}


def test_an_evaluation_of_an_older_version_is_found(home, tmp_path):
    file = tmp_path / "cache" / "evaluations" / f"{model_key(home / 'mlx')}.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"questions": "scenes", "rows": ROWS}))
    assert load_evaluation(home / "mlx", None)["rows"] == ROWS


@pytest.mark.parametrize("text", ["{}", '{"rows": [{}]}', '{"rows": [{"pruner": "a"}]}', "[]"])
def test_a_file_that_is_no_evaluation_is_refused(tmp_path, text):
    (tmp_path / "e.json").write_text(text)
    with pytest.raises(UserError, match=r"e\.json"):
        load_evaluation(None, tmp_path / "e.json")


def test_the_command_prints_ten_lines_and_writes_every_figure(home, tmp_path, capsys):
    file = tmp_path / "advice.json"
    (tmp_path / "e.json").write_text(json.dumps({"questions": "mine", "rows": ROWS}))
    main(["--model", str(home / "mlx"), "--evaluation", str(tmp_path / "e.json"),
          "--json", str(file)])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 10 and lines[-1].startswith("Advice: ")
    figures = json.loads(file.read_text())
    assert figures["tokens"] == tiny.N and figures["kept"] == tiny.N // 4
    assert figures.keys() >= {"times", "cache_bytes", "frontier", "machine", "versions"}
    assert min(figures["times"]["first"].values()) > 0


def test_the_cache_bytes_are_those_of_generate(home):
    model, processor = load(home / "mlx")
    picture = Image.new("RGB", (80, 80), "red")
    measured = advise(model, processor, picture, {})
    answer = generate(model, processor, "What is this?", picture, max_tokens=1)
    assert measured.cache_bytes[0] == answer.cache_bytes
    fewer = generate(model, processor, "What is this?", picture, pruner="random",
                     keep_tokens=4, max_tokens=1)  # fmt: skip
    assert measured.cache_bytes[1] == fewer.cache_bytes


def test_the_command_to_copy_names_the_image_that_was_measured(home, tmp_path):
    place = tmp_path / "my photo.png"
    Image.new("RGB", (80, 80), "red").save(place)
    measured = advise(*load(home / "mlx"), place, {})
    assert measured.image == str(place)
    command = replace(measured, times=TIMES).recommendation
    assert f" --image '{place}' --prompt" in command
