"""Promises of the benchmark beside rivals: equal logits or nothing is timed, fair turns, JSON."""

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import command_line, model_shapes, rivals
from mlx_vlm_prune.checkpoints.config import (
    CLIPConfig,
    MiniMindConfig,
    ProjectorConfig,
    SiglipConfig,
    VLMConfig,
)

# Layouts of MiniMind2-V and MiniMind-3V, 16 visual tokens each.
TINY = {
    "tiny2": VLMConfig(CLIPConfig(32, 48, 2, 2, 64, 16), MiniMindConfig(48, 64, 3, 4, 2, 128)),
    "tiny3": VLMConfig(
        SiglipConfig(32, 48, 2, 2, 64, 16),
        MiniMindConfig(48, 64, 3, 4, 2, 128, rms_norm_eps=1e-6, qk_norm=True),
        ProjectorConfig(),
    ),
}
PARTS = {"transformers": ["first token", "token"], "mlx-lm": ["prefill", "token"]}
ROWS = 16 + model_shapes.TEXT_TOKENS
WRONG = [
    ("transformers", "tower", "encoder.layers.0.mlp.fc1.weight"),
    ("transformers", "projector", "1.weight"),
    ("transformers", "language", "model.layers.2.self_attn.k_proj.weight"),
    ("transformers", "language", "model.layers.0.self_attn.q_norm.weight"),
    ("transformers", "language", "model.norm.weight"),
    ("mlx-lm", "model", "model.layers.2.self_attn.k_proj.weight"),
    ("mlx-lm", "model", "model.layers.0.self_attn.q_norm.weight"),
    ("mlx-lm", "model", "model.norm.weight"),
]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    for name, config in TINY.items():
        monkeypatch.setitem(model_shapes.SHAPES, name, config)


def installed(rival: str) -> str:
    if missing := rivals.RIVALS[rival].missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
    return rival


@pytest.fixture(params=rivals.RIVALS)
def rival(request) -> str:
    return installed(request.param)


def break_weight(side, part: str, name: str) -> None:
    """Turn the rows of one weight of theirs upside down."""
    module = getattr(side, part)
    if part == "model":
        from mlx.utils import tree_flatten

        weight = dict(tree_flatten(module.parameters()))[name]
        module.load_weights([(name, weight[::-1])], strict=False)
    else:
        weight = module.get_parameter(name)
        weight.copy_(weight.flip(0))


@pytest.mark.parametrize("name", TINY)
def test_the_logits_are_equal_in_every_row_and_with_caches(rival, name):
    pair = rivals.RIVALS[rival].make_pair(TINY[name])
    assert pair.ours.prompt_logits().shape == pair.theirs.prompt_logits().shape == (ROWS, 128)
    assert rivals.require_equal(name, rival, pair) < 1e-5


@pytest.mark.parametrize(("rival_name", "part", "weight"), WRONG)
def test_a_wrong_weight_is_refused(rival_name, part, weight):
    pair = rivals.RIVALS[installed(rival_name)].make_pair(TINY["tiny3"])
    break_weight(pair.theirs, part, weight)
    with pytest.raises(rivals.UserError, match="nothing is timed unless they are equal"):
        rivals.require_equal("tiny3", rival_name, pair)


def test_a_new_token_at_a_wrong_place_is_refused(monkeypatch):
    pair = rivals.RIVALS[installed("mlx-lm")].make_pair(TINY["tiny2"])
    prefill = pair.ours.prefill

    def prefill_one_off():
        logits, state = prefill()
        return logits, replace(state, position=state.position + 1)

    assert rivals.largest_difference(pair) < 1e-5
    monkeypatch.setattr(pair.ours, "prefill", prefill_one_off)
    with pytest.raises(rivals.UserError, match="logits differ by"):
        rivals.require_equal("tiny2", "mlx-lm", pair)


class ConstantSide:
    """A side whose every logit is `value`; it appends each of its calls to `calls`."""

    def __init__(self, value: float, calls: list, name: str):
        self.value, self.calls, self.name = value, calls, name

    def prompt_logits(self) -> np.ndarray:
        return np.full((3, 5), self.value)

    def prefill(self):
        self.calls.append((self.name, "prefill"))
        return np.full((1, 5), self.value), "cache"

    def step(self, token, cache):
        assert cache == "cache"
        self.calls.append((self.name, "step"))
        return np.full((1, 5), self.value)


def constant_pair(ours: float, theirs: float, calls: list | None = None) -> rivals.Pair:
    calls = [] if calls is None else calls
    sides = ConstantSide(ours, calls, "ours"), ConstantSide(theirs, calls, "theirs")
    return rivals.Pair(*sides, lambda logits: logits.argmax(-1), "prefill", "nowhere")


def install_pair(monkeypatch, pair: rivals.Pair) -> list[str]:
    """Let the rival mlx-lm be `pair`; the command line's arguments for it."""
    monkeypatch.setitem(rivals.RIVALS, "mlx-lm", rivals.Rival(lambda _: pair, (), (), ""))
    return ["--rival", "mlx-lm", "--shape", "tiny2"]


@pytest.mark.parametrize(("ours", "theirs"), [(1.0, 1.01), (np.nan, 1.0), (np.nan, np.nan)])
def test_logits_that_differ_or_are_no_numbers_are_refused(ours, theirs):
    assert rivals.require_equal("a", "b", constant_pair(1.0, 1.0005)) == pytest.approx(
        5e-4, rel=1e-2
    )
    with pytest.raises(rivals.UserError, match="a beside b: logits differ by"):
        rivals.require_equal("a", "b", constant_pair(ours, theirs))


def test_a_refusal_ends_in_one_sentence_and_nothing_is_timed_or_saved(
    monkeypatch, capsys, tmp_path
):
    calls: list = []
    argv = install_pair(monkeypatch, constant_pair(1.0, 2.0, calls))
    monkeypatch.setattr(command_line, "RESULTS", tmp_path)
    with pytest.raises(SystemExit) as stop:
        rivals.main([*argv, "--save", "rivals"])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("error: tiny2 beside mlx-lm: logits differ by 5.0e-01")
    assert not list(tmp_path.iterdir())
    assert len(calls) == 2 * (1 + rivals.CHECKED)  # only the check


def test_both_take_turns_and_read_as_many_tokens(monkeypatch, capsys):
    calls: list = []
    argv = install_pair(monkeypatch, constant_pair(1.0, 1.0, calls))
    rivals.main([*argv, "--runs", "2", "--warmup", "1", "--tokens", "3"])
    one_run = [[(name, call) for call in ("prefill", *["step"] * 3)] for name in ("theirs", "ours")]
    check = 2 * (1 + rivals.CHECKED)
    assert calls[check:] == [call for side in one_run * 3 for call in side]  # one warms up
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["runs"] == 2


def test_the_last_line_is_json_with_every_figure_and_it_is_saved(
    rival, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(command_line, "RESULTS", tmp_path)
    flags = ["--rival", rival, "--shape", "tiny2", "--shape", "tiny3"]
    rivals.main([*flags, "--runs", "3", "--tokens", "4", "--save", "rivals"])
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert json.loads((tmp_path / "rivals.json").read_text()) == result
    assert result.keys() >= {"benchmark", "machine", "versions", "runs", "rows", "dtype"}
    assert result["benchmark"] == "rivals"
    for module in rivals.RIVALS[rival].modules:
        assert result["versions"][module.replace("_", "-")]
    assert [(row["shape"], row["part"]) for row in result["rows"]] == [
        (name, part) for name in TINY for part in PARTS[rival]
    ]
    for row in result["rows"]:
        assert row["rival"] == rival and row["prompt_rows"] == ROWS
        for side in ("ours_ms", "theirs_ms", "gain"):
            assert row[side]["p10"] <= row[side]["p90"]
        assert row["ours_ms"]["median"] > 0 and row["theirs_ms"]["median"] > 0
        realised = row["gain"]["realised"]
        assert realised is None or row["gain"]["p10"] <= realised <= row["gain"]["p90"]
    assert sum(line.startswith(tuple(PARTS[rival])) for line in table) == len(result["rows"])


def test_the_ratio_is_theirs_by_ours(monkeypatch, capsys):
    ms = {"ours": {"prefill": 2.0, "token": 4.0}, "theirs": {"prefill": 6.0, "token": 2.0}}
    argv = install_pair(monkeypatch, constant_pair(1.0, 1.0))
    monkeypatch.setattr(rivals, "time_answer", lambda side, *_: ms[side.name])
    rivals.main([*argv, "--runs", "2"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["gain"]["realised"] for row in rows] == [3.0, 0.5]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--shape", "minimind9"], "no shape is called 'minimind9'"),
        (["--rival", "llama.cpp"], "invalid choice: 'llama.cpp'"),
        (["--runs", "0"], "'0' is not a whole number from 1 on"),
        (["--save", "a/b"], "'a/b' is no plain file name"),
    ],
)
def test_a_mistake_ends_in_one_sentence(monkeypatch, capsys, argv, sentence):
    for name, known in rivals.RIVALS.items():  # as if all were installed
        monkeypatch.setitem(rivals.RIVALS, name, replace(known, modules=()))
    with pytest.raises(SystemExit) as stop:
        rivals.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert sentence in err and err.count("\n") == 1


def test_a_rival_that_is_not_installed_is_refused_with_what_to_install(monkeypatch, capsys):
    absent = replace(rivals.RIVALS["mlx-lm"], modules=("no_such_module",), install="no-such")
    monkeypatch.setitem(rivals.RIVALS, "mlx-lm", absent)
    with pytest.raises(SystemExit) as stop:
        rivals.main(["--rival", "mlx-lm"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert "--rival mlx-lm needs it; python -m pip install no-such" in err
