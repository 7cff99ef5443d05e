"""Promises of docs/upstream: scripts print what the texts say, with the versions named there."""

import ast
import re
from contextlib import redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path

import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

from mlx_vlm_prune.hosts.families import FAMILIES

from .entry_points import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
FOLDER = ROOT / "docs/upstream"
BLOCK = re.compile(r"```(py|text)\n(.*?)```", re.S)
LONGEST = 12  # statements of a script, however many lines a formatter gives them


NAMED = re.compile(r"\b(mlx-vlm|MLX|transformers) (\d+(?:\.\d+)+)")


def sections() -> list[tuple[Path, str, str]]:
    """Pages, titles and texts of all sections that hold a script."""
    parts = []
    for page in sorted(FOLDER.glob("*.md")):
        for part in re.split(r"^##? ", page.read_text(encoding="utf-8"), flags=re.M)[1:]:
            parts.append((page, f"{page.stem}: {part.splitlines()[0]}", part))
    return [section for section in parts if "```text" in section[2]]


def named_versions(page: Path) -> dict[str, str]:
    """Packages with the versions that a text names before its first section."""
    beginning = page.read_text(encoding="utf-8").partition("\n## ")[0]
    return {name.lower(): number for name, number in NAMED.findall(beginning)}


def is_installed(versions: dict[str, str]) -> bool:
    """Is it these? A version may be named in part."""
    return all(f"{version(name)}.".startswith(f"{number}.") for name, number in versions.items())


SECTIONS = sections()


def test_scripts_are_run_with_all_the_versions_that_a_text_names():
    versions = {"mlx-vlm": "0.7.10", "mlx": "0.32.4", "transformers": "5.24"}
    assert named_versions(FOLDER / "mlx-vlm-faults.md") == versions
    assert named_versions(FOLDER / "mlx-vlm-detail.md") == {"mlx-vlm": "0.7.10"}
    installed = {name: version(name) for name in versions}
    assert is_installed(installed)
    for name in versions:
        assert not is_installed(installed | {name: "0.0"})


def test_the_list_says_which_scripts_are_run():
    beginning = (FOLDER / "README.md").read_text("utf-8").partition("\n- ")[0]
    assert re.findall(r"`([\w-]+\.md)`", beginning) == sorted({page.name for page, *_ in SECTIONS})


@pytest.mark.parametrize(
    ("page", "text"), [pytest.param(page, text, id=title) for page, title, text in SECTIONS]
)
def test_the_scripts_of_a_section_print_what_it_says(page, text):
    """A section's scripts go on from those before them."""
    if not is_installed(named_versions(page)):
        pytest.skip(f"{page.name} is about {named_versions(page)}")
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
    blocks = [block for *_, text in SECTIONS for kind, block in BLOCK.findall(text) if kind == "py"]
    assert len(SECTIONS) == 7 and len(blocks) == 10
    assert max(len(ast.parse(block).body) for block in blocks) <= LONGEST


@pytest.mark.parametrize("page", sorted(FOLDER.glob("*.md")), ids=lambda page: page.stem)
def test_a_text_is_in_the_list_and_its_python_can_be_read(page: Path):
    text = page.read_text(encoding="utf-8")
    for kind, block in BLOCK.findall(text):
        if kind == "py":
            ast.parse(block.replace("    ...\n", "    pass\n"))
    assert page.name == "README.md" or f"({page.name})" in (FOLDER / "README.md").read_text("utf-8")


def test_the_hook_is_called_as_it_is_declared_and_counts_todays_families():
    text = (FOLDER / "mlx-vlm-146-pruning-hook.md").read_text(encoding="utf-8")
    families = {*FAMILIES.values()}
    batched = [family for family in families if not family.why_no_batches]
    assert text.count(f"{len(families)} of mlx-vlm's families") == 1
    assert f"these {len(families)} families" in text and f"in {len(batched)} of them" in text
    (call,) = re.findall(r"`kept = ([^`]*)`", text)
    (argument,) = ast.parse(call, mode="eval").body.args
    assert "def __call__(self, tokens: VisualTokens)" in text and argument.func.id == "VisualTokens"
    fields = re.search(r"class VisualTokens:\n((?:    .*\n)+)", text)[1]
    assert [name.id for name in argument.args] == re.findall(r"^    (\w+):", fields, flags=re.M)
