"""Promises of docs/upstream: the scripts print what the texts say, with the versions they name."""

import ast
import re
from contextlib import redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path

import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

from .entry_points import ROOT

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # transformers' own
    pytest.mark.skipif(version("mlx-vlm") != "0.7.10", reason="the texts are about mlx-vlm 0.7.10"),
]
FOLDER = ROOT / "docs/upstream"
BLOCK = re.compile(r"```(py|text)\n(.*?)```", re.S)
LONGEST = 12  # statements of a script, however many lines a formatter gives them


def sections() -> list[tuple[str, str]]:
    """Titles and texts of all sections that hold a script."""
    parts = []
    for page in sorted(FOLDER.glob("mlx-vlm-*.md")):
        for part in re.split(r"^##? ", page.read_text(encoding="utf-8"), flags=re.M)[1:]:
            parts.append((f"{page.stem}: {part.splitlines()[0]}", part))
    return [(title, part) for title, part in parts if "```text" in part]


SECTIONS = sections()


@pytest.mark.parametrize("text", [pytest.param(text, id=title) for title, text in SECTIONS])
def test_the_scripts_of_a_section_print_what_it_says(text):
    """A section's scripts go on from those before them."""
    namespace = {"__name__": "__main__"}
    printed = ""
    for kind, block in BLOCK.findall(text):
        if kind == "text":
            assert printed == block
            continue
        out = StringIO()
        with redirect_stdout(out):
            exec(compile(block, "script", "exec"), namespace)
        printed = out.getvalue()


def test_the_scripts_are_short_and_there_are_as_many_as_were_written():
    blocks = [block for _, text in SECTIONS for kind, block in BLOCK.findall(text) if kind == "py"]
    assert len(SECTIONS) == 7 and len(blocks) == 10
    assert max(len(ast.parse(block).body) for block in blocks) <= LONGEST


@pytest.mark.parametrize("page", sorted(FOLDER.glob("*.md")), ids=lambda page: page.stem)
def test_a_text_is_in_the_list_and_its_python_can_be_read(page: Path):
    text = page.read_text(encoding="utf-8")
    for kind, block in BLOCK.findall(text):
        if kind == "py":
            ast.parse(block.replace("    ...\n", "    pass\n"))
    assert page.name == "README.md" or f"({page.name})" in (FOLDER / "README.md").read_text("utf-8")
