"""`evaluate --compare-with FILE`: the rows of an earlier result beside those of the run."""

import json

import pytest

from mlx_vlm_prune.evaluation import bootstrap

from . import test_evaluate
from .test_evaluate import command, refused, run

_cache, home = test_evaluate._cache, test_evaluate.home  # fixtures
BUDGETS = ("--keep-tokens", "4", "--keep-tokens", "2")


@pytest.fixture(scope="module")
def earlier(home, tmp_path_factory):
    """A result with `norm` and `random`."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("earlier")
        patch.setattr(bootstrap, "FEWEST", 1)
        patch.setenv("MLX_VLM_PRUNE_CACHE", str(folder / "cache"))
        run(home, folder / "earlier.json", *BUDGETS, specs=("norm",))
        yield folder / "earlier.json"


def changed(path, folder, **more):
    """A copy of a result with other contents."""
    content = json.loads(path.read_text(encoding="utf-8"))
    copy = folder / "changed.json"
    copy.write_text(json.dumps(content | more), encoding="utf-8")
    return copy


def test_the_table_is_that_of_one_run_with_all_methods(home, earlier, tmp_path, capsys):
    beside = run(
        home, tmp_path / "new.json", *BUDGETS, "--compare-with", str(earlier), specs=("tome",)
    )
    printed = capsys.readouterr().out
    together = run(home, tmp_path / "all.json", *BUDGETS, specs=("norm", "tome"))

    def rows(result):
        return sorted(result["rows"], key=lambda row: (row["pruner"], row["tokens"]))

    assert rows(beside) == rows(together) and len(beside["rows"]) == 7
    (source,) = beside["earlier"]
    assert source["file"] == "earlier.json" and source["rows"] == 2
    assert "norm" in printed and "Rows of earlier.json: 2, measured on 20" in printed


def test_a_result_of_other_questions_or_options_is_refused_before_a_question_is_put(
    home, earlier, tmp_path, capsys
):
    cases = [
        ({"model_key": "0"}, "its model_key is '0', here '"),
        ({"seed": 1}, "its seed is 1, here 0"),
        ({"max_tokens": 9}, "its --max-tokens is 9, here 3"),
        ({"count": 12}, "has 12 questions, and this run 11; it must ask as many"),
    ]
    for more, sentence in cases:
        path = changed(earlier, tmp_path, **more)
        argv = command(home, tmp_path / "new.json", "--compare-with", str(path))
        assert sentence in refused(capsys, argv)
    assert not [*tmp_path.glob("new*")]


def test_where_full_answers_otherwise_the_result_has_the_runs_rows_alone(
    home, earlier, tmp_path, capsys
):
    rows = json.loads(earlier.read_text(encoding="utf-8"))["rows"]
    path = changed(earlier, tmp_path, rows=[rows[0] | {"logprob": 0.5}, *rows[1:]])
    result = run(
        home, tmp_path / "new.json", *BUDGETS, "--compare-with", str(path), specs=("tome",)
    )
    assert {row["pruner"] for row in result["rows"]} == {"none", "random", "tome"}
    assert "its logprob is 0.5, here" in capsys.readouterr().err and "earlier" not in result
