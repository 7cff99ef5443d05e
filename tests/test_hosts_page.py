"""Promises of docs/hosts.md: it is what the code declares, and tiny models do as it says."""

from pathlib import Path

import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
from benchmarks.hosts_page import COLUMNS, page
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.compatibility import check_pipeline
from mlx_vlm_prune.hosts.families import FAMILIES, host_of
from mlx_vlm_prune.planning.host_operations import language_sizes
from mlx_vlm_prune.pruners import plan

from .host_models import KINDS
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
        "behind the tower": "vispruner",
        "between the tower's layers": "tome",
        "between the language model's layers": "fastv",
        "`restore`": "divprune+restore",
        "downsample": "downsample",
    }
    for column, spec in probes.items():
        assert is_possible(host, spec, None) is works[column], (column, spec)
    assert is_possible(host, "norm", "keep") is works["kept positions"]
    assert (language_sizes(host) is not None) is works["predicted costs"]
    assert (host.feature_dims is not None) is works["learned methods"]
    assert (kind in BATCHED) is works["batches, `serve`"]


def is_possible(host, spec: str, positions: str | None) -> bool:
    try:
        check_pipeline(host, plan(spec), positions)
    except UserError:
        return False
    return True
