"""Promises of `plot`: a figure for what each file holds, as PNG and SVG, a page of all, and a
sentence for what is no result."""

import base64
import copy
import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from mlx_vlm_prune import encode, evaluate, plot, sweep
from mlx_vlm_prune.plots.figures import plan_figures
from mlx_vlm_prune.plots.measured import read_result
from mlx_vlm_prune.plots.panels import best_methods, frontier

from . import dual_encoders, tiny

SPECS = ["norm", "tome", "random", "avgpool"]
OF_SWEEP = {
    "speed-by-tokens", "agreement-by-tokens", "agreement-by-time", "token-reduction", "gains",
    "time-by-part",
}  # fmt: skip
OF_BOTH = {"accuracy-by-tokens", "accuracy-by-time", "kinds"}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """sweep.json and evaluation.json of a tiny model, by the commands themselves."""
    folder = tmp_path_factory.mktemp("plot")
    model = str(tiny.checkpoint(tiny.reference(), folder))
    pixels = np.random.default_rng(0).integers(0, 255, (70, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    questions = [
        {"id": str(n), "image": "a.png", "question": text, "kind": kind, "answer": "yes"}
        for n, (text, kind) in enumerate([("Is there a red star?", "a"), ("How many?", "b")])
    ]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    budgets = ["--keep-tokens", "8", "--keep-tokens", "4"]
    sweep.main([
        "--model", model, "--image", str(folder / "a.png"), "--prompt", "Is there a red star?",
        "--pruner", *SPECS, *budgets, "--runs", "2", "--max-tokens", "3",
        "--json", str(folder / "sweep.json"),
    ])  # fmt: skip
    evaluate.main([
        "--model", model, "--questions", str(folder / "q.jsonl"), "--max-tokens", "3", *budgets,
        *(part for spec in SPECS for part in ("--pruner", spec)),
        "--out", str(folder / "evaluation.json"),
    ])  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def drawn(desk):
    plot.main([str(desk / "sweep.json"), str(desk / "evaluation.json"), "--out", str(desk / "f/g")])
    return desk / "f/g"


def svg_texts(file) -> set[str]:
    return set(re.findall(r"<text[^>]*>([^<]+)</text>", file.read_text(encoding="utf-8")))


def changed(desk, tmp_path, name: str, change) -> str:
    """A copy of a result, changed."""
    content = json.loads((desk / name).read_text())
    change(content)
    (tmp_path / name).write_text(json.dumps(content))
    return str(tmp_path / name)


def test_every_figure_is_there_as_vectors_and_as_pixels(drawn):
    names = {f"{name}.{kind}" for name in OF_SWEEP | OF_BOTH for kind in ("png", "svg")}
    assert {path.name for path in drawn.iterdir()} == {*names, "dashboard.html"}
    for name in names:
        if name.endswith("png"):
            with Image.open(drawn / name) as picture:
                assert min(picture.size) > 200
        else:
            assert (drawn / name).stat().st_size > 1000


def test_the_figures_name_methods_budgets_and_what_is_measured(drawn):
    for name in ("speed-by-tokens", "agreement-by-tokens", "accuracy-by-tokens"):
        assert {*SPECS, "16", "8", "4"} <= svg_texts(drawn / f"{name}.svg")
    for name in ("token-reduction", "gains", "time-by-part"):
        assert {f"{spec}, {K}" for spec in SPECS for K in (8, 4)} <= svg_texts(
            drawn / f"{name}.svg"
        )
    assert {"visual tokens", "operations", "cache"} <= svg_texts(drawn / "token-reduction.svg")
    assert {"image", "vision", "pruner", "prefill", "full"} <= svg_texts(drawn / "time-by-part.svg")
    assert {"a", "b", *SPECS} <= svg_texts(drawn / "kinds.svg")
    for name in ("accuracy-by-time", "agreement-by-time"):
        texts = svg_texts(drawn / f"{name}.svg")
        assert {"8 tokens", "4 tokens", "all 16", "on the frontier:"} <= texts


def test_the_page_is_whole_in_itself_and_says_what_was_measured_where(drawn, desk):
    page = (drawn / "dashboard.html").read_text(encoding="utf-8")
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == len(OF_SWEEP | OF_BOTH)
    assert base64.b64decode(pictures[0]) == (drawn / "speed-by-tokens.png").read_bytes()
    assert not re.search(r"https?://|<script|<link", page)
    machine = json.loads((desk / "sweep.json").read_text())["machine"]
    assert f"{machine['cpu']}, {machine['cores']} cores" in page
    assert page.count("<td>avgpool</td>") == 4


def test_the_pages_texts_cannot_be_markup(desk, tmp_path):
    def change(content):
        content["prompt"] = "<script>alert(1)</script>"
        content["rows"][0]["answers"][0]["text"] = "<b>bold</b>"

    file = changed(desk, tmp_path, "sweep.json", change)
    plot.main([file, "--out", str(tmp_path / "f")])
    page = (tmp_path / "f/dashboard.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "<b>" not in page and "&lt;b&gt;bold" in page


def test_what_is_drawn_twice_is_the_same(drawn, desk, tmp_path):
    plot.main([str(desk / "sweep.json"), str(desk / "evaluation.json"), "--out", str(tmp_path)])
    for path in drawn.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_several_files_of_a_kind_have_figures_by_their_names(desk, tmp_path):
    content = json.loads((desk / "sweep.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(content))
    files = [desk / "sweep.json", tmp_path / "other.json", desk / "evaluation.json"]
    names = {figure.name for figure in plan_figures([read_result(file) for file in files])}
    assert {f"{name}-{stem}" for name in OF_SWEEP for stem in ("sweep", "other")} <= names
    assert {"accuracy-by-tokens", "accuracy-by-time-sweep", "accuracy-by-time-other"} <= names


def test_without_parts_and_kinds_their_figures_are_left_out(desk, tmp_path):
    """On a GPU parts are not timed alone."""

    def change(content):
        for row in content["rows"]:
            row["ms"] |= dict.fromkeys(("vision", "pruner", "prefill"))

    file = changed(desk, tmp_path, "sweep.json", change)
    plot.main([file, "--out", str(tmp_path / "f")])
    names = {path.stem for path in (tmp_path / "f").glob("*.svg")}
    assert names == OF_SWEEP - {"time-by-part"}


def test_results_of_other_models_are_not_drawn_into_one(desk, tmp_path, capsys):
    other = changed(
        desk, tmp_path, "sweep.json", lambda content: content.update(model="other", model_key="x")
    )
    plot.main([other, str(desk / "evaluation.json"), "--out", str(tmp_path / "f")])
    assert not (tmp_path / "f/accuracy-by-time.png").exists()
    err = capsys.readouterr().err
    assert "no accuracy against time of evaluation and sweep: one is of " in err


def test_an_evaluation_with_times_needs_no_sweep(desk, tmp_path):
    def change(content):
        for ms, row in enumerate(content["rows"], 10):
            row["first_token_ms"] = {"total": float(ms)}

    file = changed(desk, tmp_path, "evaluation.json", change)
    plot.main([file, str(desk / "sweep.json"), "--out", str(tmp_path / "f")])
    assert "on the frontier:" in svg_texts(tmp_path / "f/accuracy-by-time.svg")
    times = svg_texts(tmp_path / "f/accuracy-by-time.svg")
    assert {"10", "12", "14"} <= times  # its own milliseconds
    assert "<td>10.0</td>" in (tmp_path / "f/dashboard.html").read_text()


def test_the_results_of_encode_are_drawn(tmp_path):
    dual_encoders.write(dual_encoders.random_clip(), tmp_path / "clip")
    images = dual_encoders.write_pictures(tmp_path / "classes", 6, ("cat", "star"))
    file = tmp_path / "e.json"
    encode.main(["--model", str(tmp_path / "clip"), "--image", str(images), "--json", str(file),
                 "--pruner", "patch_norm", "tome", "--keep-ratio", "0.7", "0.5"])  # fmt: skip
    plot.main([str(file), "--out", str(tmp_path / "f")])
    names = {path.stem for path in (tmp_path / "f").glob("*.svg")}
    kinds = ("cosine", "same-text", "zero-shot")
    assert names == {"encode-speed-by-tokens", *(f"{k}-by-{x}" for k in kinds
                                                 for x in ("tokens", "time"))}  # fmt: skip
    assert {"patch_norm", "tome", "16", "11", "8"} <= svg_texts(tmp_path / "f/cosine-by-tokens.svg")
    assert "<td>1.0000</td>" in (tmp_path / "f/dashboard.html").read_text()


def refused(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as stop:
        plot.main([str(one) for one in argv])
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "") and err.count("\n") == 1
    return err


BROKEN = {
    "no rows": lambda content: content.pop("rows"),
    "rows that are none": lambda content: content.update(rows=3),
    "no full": lambda content: content["rows"].pop(0),
    "no times": lambda content: content["rows"][1].pop("ms"),
    "no machine": lambda content: content.pop("machine"),
    "a text for a number": lambda content: content["rows"][1].update(tokens="8"),
    "no tokens at all": lambda content: content["rows"][0].update(of=0),
}


REASONS = {
    "no rows": "there is no rows", "rows that are none": "a value is of another kind",
    "no full": "no row has all visual tokens", "no times": "there is no ms",
    "no machine": "there is no machine", "a text for a number": "a value is of another kind",
    "no tokens at all": "a value is of another kind",
}  # fmt: skip


@pytest.mark.parametrize("change", BROKEN)
def test_what_is_no_result_is_refused_in_a_sentence(change, desk, tmp_path, capsys):
    file = changed(desk, tmp_path, "sweep.json", BROKEN[change])
    err = refused(capsys, file, "--out", tmp_path / "f")
    assert f"{file} is no result of `sweep`, `evaluate` or `encode`: {REASONS[change]}" in err
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("command", ["scan", "generate", "advise", "evaluate --merge"])
def test_another_commands_file_is_named(command, tmp_path, capsys):
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"command": command, "rows": [{"overall": 1}]}))
    sentence = f"{file} is a result of `{command}`; plot reads those of `sweep`, `evaluate` or"
    assert sentence in refused(capsys, file)


def test_other_mistakes_are_a_sentence_too(desk, tmp_path, capsys):
    good = desk / "sweep.json"
    (tmp_path / "a.json").write_text("[")
    (tmp_path / "b.json").write_text("{}")
    assert "a.json is not valid JSON" in refused(capsys, tmp_path / "a.json")
    assert "b.json is no result" in refused(capsys, tmp_path / "b.json")
    assert "cannot read nowhere.json" in refused(capsys, "nowhere.json")
    assert "the same file name" in refused(capsys, good, good)
    assert "cannot write into" in refused(capsys, good, "--out", tmp_path / "a.json")
    unscored = changed(desk, tmp_path, "evaluation.json", lambda c: [
        row.pop("overall") for row in c["rows"]])  # fmt: skip
    assert "its answers were not scored" in refused(capsys, unscored)
    only_full = changed(desk, tmp_path, "sweep.json", lambda c: c.update(rows=c["rows"][:1]))
    assert "nothing to compare" in refused(capsys, only_full)


def test_ctrl_c_leaves_whole_figures(desk, tmp_path, monkeypatch, capsys):
    real, calls = plot.draw, []

    def interrupted(figure, folder):
        calls.append(figure)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(figure, folder)

    monkeypatch.setattr(plot, "draw", interrupted)
    with pytest.raises(SystemExit) as stop:
        plot.main([str(desk / "sweep.json"), "--out", str(tmp_path)])
    assert stop.value.code == 130
    assert "interrupted: 2 of 6 figures are written" in capsys.readouterr().err
    assert len([*tmp_path.iterdir()]) == 4


def test_the_figures_leave_a_users_own_style_alone(desk, tmp_path):
    import matplotlib

    before = copy.copy(dict(matplotlib.rcParams))
    plot.main([str(desk / "sweep.json"), "--out", str(tmp_path)])
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or matplotlib.get_backend()


def test_the_best_are_the_highest_and_of_times_the_lowest():
    lines = {"a": {8: 1.0}, "b": {8: 3.0}, "c": {4: 9.0}, "random": {8: 9.0}}
    assert best_methods(lines, 8) == ["b", "a"]
    assert best_methods(lines, 8, lowest=True) == ["a", "b"]


def test_the_frontier_is_what_nothing_beats_in_both():
    assert frontier([(3, 1), (1, 1), (2, 5), (2, 4), (4, 5)]) == [(1, 1), (2, 5)]
