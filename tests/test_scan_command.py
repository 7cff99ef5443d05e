"""Promises of `scan`: what it measures, fits, prints, writes and refuses."""

import json

import mlx.core as mx
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx_vlm_prune import scan
from mlx_vlm_prune.planning import row_scaling
from mlx_vlm_prune.planning.row_scaling import LOOP, Measurement, exponent, layers

from .pruner_cases import close

SMALL = ["--rows", "8", "16", "24", "--runs", "2", "--hidden-size", "64", "--loop-rows", "16"]


def test_it_prints_every_layer_and_writes_all_figures(tmp_path, capsys):
    files = tmp_path / "a.json", tmp_path / "a.svg"
    scan.main([*SMALL, "--json", str(files[0]), "--plot", str(files[1])])
    out = capsys.readouterr().out
    written = json.loads(files[0].read_text(encoding="utf-8"))
    cases = {(one["layer"], one["rows"]) for one in written["measurements"]}
    names = {"scan", "attention", "mamba-2", "mrss r=2", "mrss r=4"}
    assert cases == {(n, rows) for n in names for rows in (8, 16, 24)} | {(LOOP, 8), (LOOP, 16)}
    assert all(len(one["ms"]) == 2 and min(one["ms"]) > 0 for one in written["measurements"])
    assert set(written["exponents"]) == {*names, LOOP}
    assert set(written["loop_to_scan"]) == {"8", "16"}
    assert written["mrss"]["2"]["updates_to_scan"] == 1.5
    assert written["mrss"]["4"]["updates_to_scan"] == 1.25
    assert written["machine"]["cpu"] and written["versions"]["mlx"]
    assert "At 16 rows mlx-lm's loop takes" in out and "1.50 x the scan's updates" in out
    assert files[1].read_text(encoding="utf-8").startswith("<?xml")


def test_the_layers_of_a_scan_and_of_the_loop_are_the_same(monkeypatch):
    """In several pieces too; attention in pieces is attention at once."""
    named, x = layers(64, 4, [2]), mx.random.normal((1, 20, 64))
    whole = {name: layer(x) for name, layer in named.items()}
    close(*(whole[name].astype(mx.float32).tolist() for name in ("scan", LOOP)))
    monkeypatch.setattr(row_scaling, "PREFILL_STEP_SIZE", 7)
    for name in ("scan", "attention", "mamba-2"):
        close(named[name](x).tolist(), whole[name].tolist())


@pytest.mark.parametrize("p", (0.5, 1, 2))
def test_the_exponent_of_a_power_is_found(p):
    assert exponent([(x, 3 * x**p) for x in (1, 2, 4, 8)]) == pytest.approx(p)
    assert exponent([(4, 7)]) is None


def test_ratios_are_of_neighbours():
    slow, fast = Measurement("a", 1, [4.0, 9, 8]), Measurement("b", 1, [2.0, 3, 1])
    assert row_scaling.ratios(slow, fast) == (3, 2, 8)


def test_one_length_has_no_exponent(capsys):
    scan.main(["--rows", "8", "--runs", "1", "--hidden-size", "64", "--loop-rows", "0"])
    out = capsys.readouterr().out
    assert "grows" not in out and LOOP not in out


REFUSED = {
    "--hidden-size is 100; it must be a multiple of 64": ["--hidden-size", "100"],
    "must end in .png, .svg or .pdf": ["--plot", "a.txt"],
    "'0' is not a whole number from 1 on": ["--rows", "0"],
    "no folder": ["--json", "no/where/a.json"],
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_a_mistake_is_refused_before_anything_is_measured(sentence, capsys, monkeypatch):
    monkeypatch.setattr(scan, "measure", None)
    with pytest.raises(SystemExit) as stop:
        scan.main(REFUSED[sentence])
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_an_interrupt_is_told_and_leaves_nothing_half_written(tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(scan, "measure", interrupt)
    with pytest.raises(SystemExit) as stop:
        scan.main([*SMALL, "--json", str(tmp_path / "a.json")])
    assert stop.value.code == 130 and not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "\ninterrupted: nothing is written\n")
