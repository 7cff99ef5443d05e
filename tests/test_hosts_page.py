"""Promises of docs/hosts.md: it is what the code declares, and tiny models do as it says."""

import re
from pathlib import Path

import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
from benchmarks.hosts_page import COLUMNS, page
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.clips import check_clip
from mlx_vlm_prune.hosts.compatibility import check_pipeline
from mlx_vlm_prune.hosts.families import FAMILIES, host_of
from mlx_vlm_prune.planning.host_operations import language_sizes
from mlx_vlm_prune.pruners import METHODS, PRESETS, Pipeline, Stage, plan

from .host_models import KINDS
from .host_reference import MROPE
from .test_pruned import BATCHED

PAGE = Path(__file__).resolve().parents[1] / "docs" / "hosts.md"


def test_the_page_is_what_the_code_declares():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m benchmarks.report"


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_model_of_every_family_does_as_the_page_says(kind):
    host = host_of(KINDS[kind].make())
    works = {name: reason(FAMILIES[kind]) is None for name, reason in COLUMNS.items()}
    works |= {"downsample": False}
    probes = {
        "after the tower": "vispruner",
        "between the tower's layers": "tome",
        "between the language model's layers": "fastv",
        "`zoo_prune`": "zoo_prune",
        "`restore`": "divprune+restore",
        "downsample": "downsample",
    }
    for column, spec in probes.items():
        assert is_possible(host, spec, None) is works[column], (column, spec)
    assert is_possible(host, "norm", "keep") is works["kept positions"]
    assert (language_sizes(host) is not None) is works["predicted costs"]
    assert (host.feature_dims is not None) is works["learned methods"]
    assert (kind in BATCHED) is works["batches of prompts"]
    try:
        check_clip(host, plan("evs"))
        reads_videos = True
    except UserError:
        reads_videos = False
    assert reads_videos is works["video"]
    assert reads_videos is (kind in MROPE)


COLUMN = {
    Stage.ENCODER: "between the tower's layers",
    Stage.DECODER: "between the language model's layers",
    Stage.ENHANCER: "`restore`",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_says_of_every_method_whether_it_works_in_a_family(kind):
    host = host_of(KINDS[kind].make())
    _, _, rest = page().partition("## Limits")
    limits, _, rest = rest.partition("## In no family")
    nowhere = rest.partition("`restore` behind")[0]
    lines = [line for line in limits.splitlines() if f"`{kind}`" in line.partition(":")[0]]
    refusals = nowhere + "\n".join(line.partition(": not ")[2].partition(":")[0] for line in lines)
    for name in [name for name in METHODS if not METHODS[name].learned] + [*PRESETS]:
        steps = plan(name).steps if name in PRESETS else plan(chain_of(name)).steps
        columns = [COLUMN[step.stage] for step in steps if step.stage in COLUMN]
        if METHODS.get(name) and METHODS[name].stage is Stage.ENHANCER:
            columns = ["`restore`"] if name == "restore" else []
        columns += ["`zoo_prune`"] * (name == "zoo_prune")
        refused = any(COLUMNS[column](FAMILIES[kind]) for column in columns) or any(
            f"`{step}`" in refusals for step in (name, *(step.name for step in steps))
        )
        assert is_possible(host, chain_of(name), None) is not refused, name
    for spec in ("fastv+restore", "divprune+restore:published"):
        assert not is_possible(host, spec, None)


def chain_of(name: str) -> str:
    is_enhancer = name in METHODS and METHODS[name].stage is Stage.ENHANCER
    return f"divprune+{name}" if is_enhancer else name


def test_every_reason_is_a_sentence_that_spells_names_as_they_are():
    assert "Mlx-vlm" not in page()
    lines = [line for line in page().splitlines() if re.match(r"\d+\. ", line)]
    assert lines and all(re.match(r"\d+\. (mlx-vlm |[A-Z])", line) for line in lines)


@pytest.mark.parametrize("kind", KINDS)
def test_the_limits_name_the_families_in_which_slots_do_not_learn(kind):
    host = host_of(KINDS[kind].make())
    _, _, limits = page().partition("## Limits")
    lines = [line for line in limits.splitlines() if f"`{kind}`" in line.partition(":")[0]]
    is_named = any("`attention_pool` does not learn" in line for line in lines)
    pool = METHODS["attention_pool"]
    can_learn = host.why_no_feature_gradient is None and (
        host.feature_dims is None
        or is_possible(
            host, plan("attention_pool", {pool.name: pool.make_weights(host.feature_dims, 2)}), None
        )
    )
    assert is_named is (host.feature_dims is not None and not can_learn)


def is_possible(host, spec: str | Pipeline, positions: str | None) -> bool:
    try:
        check_pipeline(host, plan(spec), positions)
    except UserError:
        return False
    return True
