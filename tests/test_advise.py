"""The advice: its figures, its frontier, and one recommendation that can be copied."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.advise import Advice, Times, advise, frontier, load_evaluation, main
from mlx_vlm_prune.checkpoints.errors import UserError
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
    return Advice(model, 196, 49, times, size, edge, "scenes", count=2004)


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
    assert "the first token after 100 ms, then one every 5.0 ms" in text
    assert "opening the image takes 10%, the vision tower 60%, projector and prompt 30%" in text
    assert "no method can win more than 1.43 x" in text  # 100 / (10 + 60)
    assert "with 49 tokens 1.25 x is to be expected" in text  # 100 / 80
    assert "(tome) the operation count lets expect 2.00 x" in text
    assert "(downsample) 4.00 x" in text
    assert "4.0 MB, with 49 tokens 1.5 MB" in text
    assert "fastv with 98 (-0.5 points); divprune with 49 (-1.5 points)" in text
    assert len(advice(ROWS).lines) <= 10


def test_the_recommendation_is_the_fewest_tokens_that_lose_at_most_two_points():
    assert advice(ROWS).recommendation == (
        "Advice: python -m mlx_vlm_prune.generate --model my-model --image photo.jpg"
        " --prompt '…' --pruner divprune --keep-tokens 49"
    )
    assert "--model" not in advice(ROWS, model="scenes").recommendation


def test_without_a_speedup_or_with_a_large_loss_the_advice_is_not_to_prune():
    slow = Times(10.0, 60.0, 30.0, 5.0, {"behind": 99.0, "inside": 98.0, "smaller": 97.0})
    assert "do not prune; at best it would be 1.03 x" in advice(ROWS, slow).recommendation
    lossy = [row("random", 98, 0.9), row("random", 49, 0.8)]
    assert "every method may lose more than 2%" in advice(lossy).recommendation
    unsure = row("uniform", 49, 0.98)
    unsure["to_full"]["overall"] = [-0.01, -0.03, 0.01]
    assert "every method may lose more than 2%" in advice([unsure]).recommendation


@pytest.mark.parametrize(
    ("fields", "why"), [({"count": 19}, "only 19 questions"), ({"full": 0.0}, "no right answer")]
)
def test_an_evaluation_of_few_questions_or_no_right_answer_gives_no_advice(fields, why):
    advised = replace(advice(ROWS), **fields).recommendation
    assert advised == f"Advice: evaluate again; with {why} the last one says nothing."


def test_without_an_evaluation_the_lines_name_the_command_for_one():
    lines = advice().lines
    assert any("run python -m mlx_vlm_prune.evaluate --model my-model" in line for line in lines)
    assert "evaluate first" in lines[-1]


def test_the_last_evaluation_of_this_very_model_is_found(home, tmp_path):
    assert load_evaluation(home / "mlx", None) == {}
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
