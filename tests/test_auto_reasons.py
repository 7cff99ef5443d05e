"""Figures that `auto` and its pages give as reasons are those of the committed results."""

import json
from pathlib import Path

from benchmarks.command_line import RESULTS
from mlx_vlm_prune.pruners.auto.reasons import CAUTIOUS, PUBLISHED

ROOT = Path(__file__).resolve().parents[1]


def test_figures_that_the_table_takes_from_the_results_are_those():
    rows = json.loads((RESULTS / "scenes.json").read_text())["rows"]
    counting = {(r["pruner"], r["tokens"]): f"{100 * r['accuracy']['counting']:.1f}" for r in rows}
    overall = {(r["pruner"], r["tokens"]): f"{100 * r['overall']:.1f}" for r in rows}
    (line,) = (line for line in CAUTIOUS if line.subject == "counting")
    for key in (("divprune", 22), ("divprune+restore", 22)):
        assert f"{counting[key]} %" in line.why
    assert counting["none", 196] == "100.0"
    pruned, full = [row for row in rows if row["tokens"] < 196], rows[0]["accuracy"]
    assert rows[0]["pruner"] == "none"
    weakest = [max(full, key=lambda kind: full[kind] - r["accuracy"][kind]) for r in pruned]
    number = sum(kind in ("counting", "reading") for kind in weakest)
    assert f"in {number} of {len(pruned)} results" in line.why
    inside = next(line for line in PUBLISHED if line.in_tower)
    assert inside.pruner == "patch_norm:keep=0.75+divprune+restore" and 147 == 0.75 * 196
    assert f"{overall['patch_norm:keep=147+divprune+restore', 22]} %" in inside.why
    assert overall["divprune+restore", 22] in inside.why


def test_gains_on_a_gpu_that_the_table_and_the_pages_name_are_those_of_the_results():
    rows = json.loads((RESULTS / "device-h200.json").read_text())["rows"]
    gains = {r["pruner"]: f"{r['gain']['total']['realised'] or 0:.2f}" for r in rows}
    assert {(r["shape"], r["tokens"], r["budget"]) for r in rows} == {("llava-7b", 576, 144)}
    (line,) = (line for line in PUBLISHED if line.on_cuda)
    readme, page = ((ROOT / name).read_text("utf-8") for name in ("README.md", "docs/auto.md"))
    for name in ("cls_attention", "divprune", "scope"):
        assert f"{gains[name]} times" in line.why
        assert f"{gains[name]} times" in page.partition("<!-- end -->")[2]
    for name in ("cls_attention", "divprune"):
        assert f"{gains[name]} times" in readme
