"""Promises of the site: it has every page and every exported name, no link is broken, and it is
built without a warning."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import mlx_vlm_prune

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NO_OBJECTS = {"__version__", "PRUNERS"}  # a text and a table


def pages_of(entry: object) -> Iterator[str]:
    """The files that a part of the navigation names."""
    if isinstance(entry, str):
        yield entry
        return
    assert isinstance(entry, list | dict)
    for each in entry.values() if isinstance(entry, dict) else entry:
        yield from pages_of(each)


def test_every_page_is_in_the_navigation():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = [*pages_of(config["nav"])]
    here = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    beside = {page.name for page in ROOT.glob("*.md")} - {"README.md"} | {"index.md", "examples.md"}
    assert len(listed) == len(set(listed)) and set(listed) == here | beside


def test_the_reference_has_every_exported_name():
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    names = [path.rpartition(".")[2] for path in re.findall(r"^::: ([\w.]+)$", page, re.M)]
    assert sorted(names) == sorted({*mlx_vlm_prune.__all__} - NO_OBJECTS)
    assert "`PRUNERS`" in page


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; mkdocs.yml makes every warning an error."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},  # an advertisement of material's
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def test_the_site_is_searchable_and_has_the_docstrings(site):
    entries = json.loads((site / "search/search_index.json").read_text("utf-8"))["docs"]
    titles = {re.sub("<[^>]+>", "", entry["title"]) for entry in entries}
    assert {"divprune", "stream_generate"} <= titles
    text = " ".join(entry["text"] for entry in entries)
    assert "Answer a prompt about any number of images" in text


def test_no_link_and_no_picture_of_the_site_is_missing(site):
    pages = sorted(site.rglob("index.html"))
    assert len(pages) > 25
    for page in pages:
        for target in re.findall(r'(?:href|src)="([^"]+)"', page.read_text("utf-8")):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc or not parts.path:
                continue
            assert (page.parent / unquote(parts.path)).exists(), (page, target)


def test_the_site_loads_nothing_from_elsewhere(site):
    text = (site / "index.html").read_text("utf-8")
    assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="https?://', text)
