"""Promises about versions: what is declared, what is tested at the lower end, what is told."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOSTS = ("mlx-vlm", "mlx-lm", "transformers")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def release(text: str) -> tuple[int, ...]:
    """(5, 14, 0) for 5.14: what pip takes for equal is equal."""
    numbers = tuple(map(int, text.split(".")))
    return numbers + (0,) * (3 - len(numbers))


def bounds(text: str) -> dict[str, set[tuple[int, ...]]]:
    """Every lower bound that a piece of pyproject.toml has, by package."""
    found: dict[str, set[tuple[int, ...]]] = {}
    for name, low in re.findall(r'"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)', text):
        found.setdefault(name, set()).add(release(low))
    return found


def pinned(name: str) -> dict[str, tuple[int, ...]]:
    lines = re.findall(r"^([\w-]+)==([\d.]+)", read(f"constraints-lowest-{name}.txt"), re.M)
    return {package: release(version) for package, version in lines}


DECLARED = bounds(read("pyproject.toml").split("[project]")[1])
OURS = bounds(read("pyproject.toml").split("\ndependencies = [")[1].split("\n]")[0])


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
def test_the_readme_tells_the_lower_bound_first(name):
    told = re.findall(rf"\b{name} (\d+\.[\d.]*\d)", read("README.md"))
    assert told and release(told[0]) in DECLARED[name]
