"""Lower bounds of dependencies: those declared, those tested, those on the pages."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOSTS = ("mlx-vlm", "mlx-lm", "transformers")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def release(text: str) -> tuple[int, ...]:
    """(5, 14, 0) for 5.14 and for 5.14.0, which pip takes as equal."""
    numbers = tuple(map(int, text.split(".")))
    return numbers + (0,) * (3 - len(numbers))


def lower_bounds(text: str) -> dict[str, set[tuple[int, ...]]]:
    """Every lower bound in a piece of pyproject.toml, by package."""
    bounds: dict[str, set[tuple[int, ...]]] = {}
    for name, low in re.findall(r'"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)', text):
        bounds.setdefault(name, set()).add(release(low))
    return bounds


def pinned(name: str) -> dict[str, tuple[int, ...]]:
    lines = re.findall(r"^([\w-]+)==([\d.]+)", read(f"constraints-lowest-{name}.txt"), re.M)
    return {package: release(version) for package, version in lines}


DECLARED = lower_bounds(read("pyproject.toml").split("[project]")[1])
OURS = lower_bounds(read("pyproject.toml").split("\ndependencies = [")[1].split("\n]")[0])


def test_every_lower_bound_of_our_own_dependencies_is_tested_alone():
    lowest = pinned("alone")
    assert len(OURS) == 7
    assert {name: {lowest.get(name)} for name in OURS} == OURS


@pytest.mark.parametrize("name", HOSTS)
def test_the_lower_bound_of_what_we_prune_in_is_tested(name):
    assert DECLARED[name] == {pinned("hosts")[name]}


@pytest.mark.parametrize("name", ["alone", "hosts"])
def test_nothing_is_tested_below_its_bound(name):
    below = {p for p, v in pinned(name).items() if p in DECLARED and v < max(DECLARED[p])}
    assert not below


@pytest.mark.parametrize("name", HOSTS)
def test_the_pages_name_the_lower_bound_first(name):
    text = read("docs/convert.md") + read("docs/mlx-vlm.md")
    releases = re.findall(rf"\b{name} (\d+\.[\d.]*\d)", text)
    assert releases and release(releases[0]) in DECLARED[name]
