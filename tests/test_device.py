"""Promises of the benchmark of a device: nothing is lost, and what is missing is named."""

import json
from dataclasses import replace

import pytest

from benchmarks import command_line, device, device_ceilings, device_page, model_shapes, rivals
from benchmarks.backend_mlx import Stack
from mlx_vlm_prune.checkpoints.config import CLIPConfig, MiniMindConfig, VLMConfig
from mlx_vlm_prune.pruners import METHODS, Stage

CONFIG = VLMConfig(CLIPConfig(32, 48, 3, 2, 64, 16), MiniMindConfig(48, 64, 4, 4, 2, 128))
PARTS = {"vision", "pruner", "projector", "prefill", "total"}
FEW = ["--pruner", "norm", "--pruner", "fastv", "--keep-ratio", "0.75", "--keep-ratio", "0.5"]
KEYS = [["tiny", 16, spec, K] for K in (12, 8) for spec in ("norm", "fastv")]


@pytest.fixture(autouse=True)
def results(monkeypatch, tmp_path):
    """The folder of results of this test; ceilings take no time, and there is a commit."""
    monkeypatch.setitem(model_shapes.SHAPES, "tiny", CONFIG)
    monkeypatch.setattr(command_line, "RESULTS", tmp_path)
    monkeypatch.setattr(device, "commit", lambda: "0123456789ab")
    limits = {"tflops": {"float32": 0.1}, "gb_per_s": 10.0}
    monkeypatch.setattr(device, "ceilings", lambda dtype: limits)
    return tmp_path


def measured(capsys, *more: str) -> tuple[list[str], dict]:
    """What a short run prints, and its last line."""
    device.main(["--name", "a", "--shape", "tiny", "--tokens", "16", "--runs", "2", *more])
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


def case_of(row: dict) -> list:
    return [row["shape"], row["tokens"], row["pruner"], row["budget"]]


def stop_after(monkeypatch, cases: int) -> None:
    """Let time be over after so many cases."""
    monkeypatch.setattr(
        device.Report, "is_over", property(lambda report: len(report.result["rows"]) >= cases)
    )


def count_runs(monkeypatch) -> list[int]:
    """Every run of a stack appends its budget."""
    budgets, run = list[int](), Stack.run

    def counted(stack, inputs, pipeline, K, tokens):
        budgets.append(K)
        return run(stack, inputs, pipeline, K, tokens)

    monkeypatch.setattr(Stack, "run", counted)
    return budgets


def test_every_method_is_measured_and_the_last_line_is_the_file(capsys, results):
    lines, result = measured(capsys, "--keep-ratio", "0.5")
    assert "MLX on " in lines[0] and lines[1].startswith("Ceilings: ")
    assert json.loads((results / "device-a.json").read_text()) == result
    methods = [name for name, m in METHODS.items() if name != "none" and m.stage < Stage.ENHANCER]
    assert [row["pruner"] for row in result["rows"]] == methods
    assert not result["missing"] and not result["refused"]
    assert result["commit"] == "0123456789ab" and result["date"][:2] == "20"
    for row in result["rows"]:
        assert case_of(row) == ["tiny", 16, row["pruner"], 8] and row["runs"] == 2
        for kind in ("full", "pruned"):
            assert row["ms"][kind].keys() == PARTS
            assert all(ms["p10"] <= ms["median"] <= ms["p90"] for ms in row["ms"][kind].values())
        assert row["gain"].keys() == {"vision", "total"}
    assert [picture["tokens"] for picture in result["pictures"]] == [16]
    opened = {row["ms"]["full"]["pruner"]["median"] for row in result["rows"]}
    assert opened == {0.0}  # full chooses nothing


def test_a_new_token_is_measured_beside_mlx_lm(capsys):
    if missing := rivals.RIVALS["mlx-lm"].missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
    _, result = measured(capsys, *FEW)
    assert [row["part"] for row in result["languages"]] == ["prefill", "token"]
    for row in result["languages"]:
        assert (
            row["difference"] <= device.RTOL[result["dtype"]]
            and row["prompt_rows"] == 16 + model_shapes.TEXT_TOKENS
        )


def test_without_mlx_lm_it_says_so_and_measures_the_rest(monkeypatch, capsys, results):
    absent = replace(rivals.RIVALS["mlx-lm"], modules=("no_such_module",))
    monkeypatch.setitem(rivals.RIVALS, "mlx-lm", absent)
    _, result = measured(capsys, *FEW)
    assert [case_of(row) for row in result["rows"]] == KEYS
    assert [row["why"] for row in result["languages"]] == ["no_such_module is not installed"]
    assert "Not compared with mlx-lm: no_such_module is not installed." in device_page.page(results)


def test_when_time_is_over_it_stops_and_names_what_is_missing(monkeypatch, capsys, results):
    stop_after(monkeypatch, 1)
    lines, result = measured(capsys, *FEW, "--minutes", "1")
    assert [case_of(row) for row in result["rows"]] == KEYS[:1]
    assert result["missing"] == KEYS[1:]
    over = [line for line in lines if line.startswith("Time was over: 3 of 4 cases are missing")]
    assert len(over) == 1 and "tiny 16 fastv 12" in over[0]
    assert "Not measured, since time was over: 3 cases." in device_page.page(results)


def test_of_a_single_pair_no_gain_is_reported(capsys):
    _, result = measured(capsys, *FEW, "--runs", "1")
    assert [row["gain"]["total"]["realised"] for row in result["rows"]] == [None] * 4


def test_time_is_over_at_its_minutes(monkeypatch, capsys):
    _, result = measured(capsys, *FEW, "--minutes", "1e-9")
    assert not result["rows"] and result["missing"] == KEYS


def test_an_interrupted_run_goes_on_and_measures_only_the_rest(monkeypatch, capsys, results):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        _, first = measured(capsys, *FEW)
    budgets = count_runs(monkeypatch)
    lines, result = measured(capsys, *FEW)
    assert result["rows"][:2] == first["rows"] and not first["languages"]
    assert {row["part"] for row in result["languages"]} == {"prefill", "token"}
    assert [case_of(row) for row in result["rows"]] == KEYS and not result["missing"]
    assert {K for K in budgets if K < 16} == {8}
    assert any("has 2 cases of this commit" in line for line in lines)


@pytest.mark.parametrize("now", ["another", "0123456789ab with changes", None])
def test_other_code_is_measured_anew(monkeypatch, capsys, now):
    measured(capsys, *FEW)
    monkeypatch.setattr(device, "commit", lambda: now)
    budgets = count_runs(monkeypatch)
    _, result = measured(capsys, *FEW)
    assert {12, 8} <= set(budgets) and [case_of(row) for row in result["rows"]] == KEYS


def test_what_was_measured_is_kept_where_a_run_is_broken_off(monkeypatch, capsys, results):
    run = Stack.run

    def broken(stack, inputs, pipeline, K, tokens):
        if K == 8:
            raise KeyboardInterrupt
        return run(stack, inputs, pipeline, K, tokens)

    monkeypatch.setattr(Stack, "run", broken)
    with pytest.raises(SystemExit) as stop:
        measured(capsys, *FEW)
    kept = json.loads((results / "device-a.json").read_text())
    assert stop.value.code == 130
    assert [case_of(row) for row in kept["rows"]] == KEYS[:2] and kept["missing"] == KEYS[2:]


def test_what_one_method_or_the_device_cannot_do_is_said_and_the_rest_measured(
    monkeypatch, capsys, results
):
    run = Stack.run

    def failing(stack, inputs, pipeline, K, tokens):
        if pipeline.spec == "norm":
            raise RuntimeError("out of memory")
        return run(stack, inputs, pipeline, K, tokens)

    monkeypatch.setattr(Stack, "run", failing)
    _, result = measured(capsys, "--pruner", "norm", "--pruner", "fastv", "--keep-ratio", "0.11",
                         "--pruner", "uniform")  # fmt: skip
    assert [row["pruner"] for row in result["rows"]] == ["uniform"] and not result["missing"]
    reasons = {entry["pruner"]: entry["why"] for entry in result["refused"]}
    assert reasons.keys() == {"norm", "fastv"} and reasons["norm"] == "out of memory"
    assert "- `norm` 1 of 16 (tiny): out of memory" in device_page.page(results)


def test_the_page_shows_every_figure_of_a_case(capsys, results):
    _, result = measured(capsys, *FEW)
    text, row = device_page.page(results), result["rows"][0]
    ms = {part: spread["median"] for part, spread in row["ms"]["pruned"].items()}
    cells = [ms["vision"], ms["pruner"], ms["projector"] + ms["prefill"], ms["total"],
             row["ms"]["full"]["total"]["median"]]  # fmt: skip
    line = " | ".join(["| 12", "`norm`", *(f"{cell:.1f}" for cell in cells)])
    assert line in text and "### tiny, 16 visual tokens" in text
    assert f"Measured on {result['date']}, commit 0123456789ab. " in text
    assert text.count("| `fastv` |") == 2


def test_without_results_the_page_says_that_there_are_none(results):
    assert device_page.page(results).endswith(f"\n{device_page.NONE_YET}")


def test_of_llava_7b_the_most_layers_that_fit_are_taken():
    needed = device_ceilings.needed_bytes("llava-7b", "bfloat16")
    assert 13.5e9 < needed / device_ceilings.ROOM < 14.5e9  # 7 B of two bytes, and the tower
    fitting = [
        device_ceilings.largest_that_fits("bfloat16", memory)
        for memory in (None, int(needed) + 1, int(needed) - 1, 10_000_000_000, 1)
    ]
    assert fitting == ["llava-7b", "llava-7b", "llava-7b-16", "llava-7b-16", "llava-7b-2"]


def test_the_ceilings_are_numbers_above_zero(monkeypatch):
    monkeypatch.setattr(device_ceilings, "is_gpu", lambda: False)
    monkeypatch.setattr(device_ceilings, "time_calls", lambda call, runs: {"median": 2.0})
    limits = device_ceilings.ceilings("float32")
    assert limits == {"tflops": {"float32": 4.295}, "gb_per_s": 536.9}


def test_a_quick_look_measures_a_few_and_is_kept_apart(monkeypatch, results):
    monkeypatch.setattr(device, "default_name", lambda: "a-machine")
    args = device.parse(["--quick"])
    few = (args.shape, args.tokens, args.keep_ratio, args.runs, args.minutes, args.name)
    assert few == (["minimind2-v"], [576], [0.25], 3, 2, "a-machine-quick")
    assert {METHODS[name].stage for name in args.pruner} > {Stage.DECODER, Stage.FEATURES}
    args = device.parse(["--quick", "--pruner", "norm", "--runs", "1", "--name", "b"])
    assert (args.pruner, args.runs, args.name) == (["norm"], 1, "b")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--shape", "minimind9"], "no shape is called 'minimind9'"),
        (["--tokens", "577"], "--tokens is 577; it must be a square"),
        (["--pruner", "nrm"], "no pruner is called 'nrm'"),
        (["--pruner", "none"], "name another"),
        (["--keep-ratio", "1"], "'1' is not a number above 0 and below 1"),
        (["--runs", "0"], "'0' is not a whole number from 1 on"),
        (["--minutes", "0"], "'0' is not a number above 0"),
        (["--minutes", "nan"], "'nan' is not a number above 0"),
        (["--name", "a/b"], "'a/b' is no plain file name"),
        (["--shape", "llava-7b"], "--shape llava-7b needs 35 GB, and there are 9 for a model"),
    ],
)
def test_a_mistake_ends_in_one_sentence_and_nothing_is_written(
    monkeypatch, capsys, results, argv, sentence
):
    monkeypatch.setattr(device_ceilings, "memory_bytes", lambda: 9_000_000_000)
    monkeypatch.setattr(device, "is_gpu", lambda: False)
    with pytest.raises(SystemExit) as stop:
        device.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert sentence in err and err.count("\n") == 1
    assert not list(results.iterdir())
