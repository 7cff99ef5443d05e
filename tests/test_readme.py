"""Promises of the README and of the pages for users: commands run, tables are the results."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import command_line, device_page, fidelity, gallery, gallery_page
from benchmarks.front_table import front_table
from benchmarks.report import FILLED, fill
from mlx_vlm_prune import load
from mlx_vlm_prune.pruners import METHODS, Stage
from mlx_vlm_prune.scenes import compose

from . import dual_encoders, tiny
from .training_runs import write_data

ROOT = Path(__file__).resolve().parents[1]
README, *PAGES = (
    ROOT / name
    for name in (
        "README.md", "docs/use.md", "docs/budgets.md", "docs/methods.md", "docs/mlx-vlm.md",
        "docs/convert.md",
    )
)  # fmt: skip


def blocks(language: str) -> list[str]:
    """The code of a language on all pages, the README's first."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in (README, *PAGES))
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def commands() -> list[list[str]]:
    """Every command line once, in order, its comment and line breaks taken out."""
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines() if line]
    return list({tuple(as_module(line)): as_module(line) for line in lines}.values())


def as_module(command: list[str]) -> list[str]:
    """`mlx-vlm-prune NAME …` as `python -m mlx_vlm_prune.NAME …`, as far as NAME is a module."""
    if command[0] != "mlx-vlm-prune":
        return command
    name = command[1]
    start = ["convert"] if name == "convert" else [f"mlx_vlm_prune.{name}"]
    if not (ROOT / "mlx_vlm_prune" / f"{name}.py").exists() and name != "convert":
        start = ["mlx_vlm_prune", name]
    return ["python", "-m", *start, *command[2:]]


def conversions_first(command: list[str]) -> tuple[bool, bool]:
    return "to-mlx" not in command, "to-torch" not in command


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder that holds what the commands name: a checkpoint, its CLIP, a photograph, data."""
    folder = tmp_path_factory.mktemp("desk")
    pth, clip = tiny.publish(tiny.reference(), folder)
    pth.rename(folder / "sft_vlm_512.pth")
    clip.rename(folder / "clip-vit-base-patch16")
    tiny.write_words(folder / "minimind2")
    compose(0).image().save(folder / "photo.jpg")
    dual_encoders.write_pictures(folder / "photos", 1)
    write_data(folder / "my-data", train=4, valid=2)
    (folder / "my-vlm").mkdir()  # as far as prune-into reads it
    (folder / "my-vlm" / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    (folder / "my-vlm" / "model.safetensors").write_bytes(b"")
    return folder


def test_every_command_runs(desk, monkeypatch):
    monkeypatch.setenv("MLX_VLM_PRUNE_CACHE", str(desk / "cache"))
    monkeypatch.setenv("MLX_VLM_PRUNE_CALIBRATION_SECONDS", "0.1")  # as short as can be
    python = [c[1:] for c in sorted(commands(), key=conversions_first) if c[0] == "python"]
    assert {command[1].split(".")[0] for command in python} == {"convert", "mlx_vlm_prune"}
    for command in python:
        done = subprocess.run(
            [sys.executable, *command], cwd=desk, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (command, done.stderr)
    written = {"my-model", "sft_vlm_512_again.pth", "kept.png", "answer.json", "my_method.py"}
    assert written <= {path.name for path in desk.iterdir()}


def test_there_are_no_other_commands_than_those_tested_here():
    others = [command for command in commands() if command[0] != "python"]
    assert others == [["pip", "install", "mlx-vlm-prune"], ["make", "demo"], ["make", "test"]]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize(
    "target",
    "demo report test test-metal test-lowest test-pythons docs browser lint clean".split(),
)
def test_make_knows_its_targets(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_python_runs(desk):
    for block in blocks("python"):
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=desk, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[1] == "98"


@pytest.mark.parametrize("page", FILLED, ids=lambda page: page.name)
def test_the_tables_are_those_of_the_results(page):
    text = page.read_text(encoding="utf-8")
    assert fill(text) == text


def test_the_list_of_methods_names_each():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `(\w+)` .*\|$", text.split("<!-- end -->")[0], re.M)
    assert named == list(METHODS)


def test_the_readme_is_short():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert text.count("<!-- table ") == 1


def test_the_front_table_has_the_baselines_and_at_most_ten_rows():
    rows = [line for line in front_table(command_line.RESULTS).splitlines() if line[:2] == "| "]
    assert len(rows) - 1 <= 10
    firsts = [row.split("|")[1].strip() for row in rows]
    assert firsts[1] == "all tokens"
    assert {"`random`", "`downsample`: a smaller picture"} <= set(firsts)


def test_figures_in_the_words_about_restore_are_those_of_the_results():
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    (words,) = re.findall(r"\*\*What `restore` gives back\.\*\*.*?\n\n", text, re.S)
    right = {(r["pruner"], r["tokens"]): f"{100 * r['overall']:.1f}" for r in rows_of("scenes")}
    sooner = {(r["pruner"], r["budget"]): r["gain"]["total"]["realised"]
              for r in rows_of("speed-scenes")}  # fmt: skip
    early = "patch_norm:keep=147+divprune+restore"
    named = [right[name, K] for name in ("divprune+restore", "divprune") for K in (49, 22)]
    named += [
        right[early, 22],
        *(f"{sooner[name, 22]:.2f}" for name in (early, "divprune+restore")),
    ]
    assert re.findall(r"(?<![-=\d.])\d+\.\d+", words.replace("12.3 ms", "")) == named


def rows_of(result: str) -> list[dict]:
    return json.loads((command_line.RESULTS / f"{result}.json").read_text())["rows"]


def test_every_local_link_leads_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r'(?:\]\(|src=")([^)"#:]+)[)"]', page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_gallery_page_has_every_method_and_is_as_the_page_is_now():
    content = gallery_page.content_of(gallery_page.PAGE.read_text(encoding="utf-8"))
    known = {row["pruner"] for row in content["answers"] + content["refused"]}
    learned = load()[0].learned  # learn_prune has no weights for the built-in model
    assert known == {
        m.name
        for m in METHODS.values()
        if m.stage is not Stage.ENHANCER and (not m.learned or m.name in learned)
        if not m.reads_frames  # it is a page of pictures
    }
    assert content["budgets"] == [{"tokens": K} for K in gallery_page.BUDGETS]
    assert len(content["views"]) == 6
    for row in content["answers"]:
        kept = [view["kept"] for view in row["steps"][-1]["views"]]
        assert kept == row["kept_indices"] and set(row["ttft_ms"].values()) == {None}
    assert gallery_page.rendered_again() == gallery_page.PAGE.read_text(encoding="utf-8")
    assert gallery_page.PAGE.stat().st_size < 5_000_000


def test_the_gallery_is_what_the_methods_and_the_results_say():
    assert gallery.page() == (ROOT / "docs" / "pruners.md").read_text(encoding="utf-8")


def test_the_page_on_the_authors_code_is_what_the_methods_and_their_cases_say():
    assert fidelity.page() == (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")


def test_the_page_of_devices_is_what_their_results_say():
    page = device_page.page(command_line.RESULTS)
    assert page == (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")
