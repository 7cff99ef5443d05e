"""Promises of docs/measuring.md: its commands run, one after another."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from mlx_vlm_prune.plot import build_parser
from mlx_vlm_prune.scenes import compose
from mlx_vlm_prune.sweep import DEFAULT_METHODS, DEFAULT_RATIOS, build_sweep_parser

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/measuring.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    text = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.S)).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line]


def test_every_command_of_the_page_runs(tmp_path):
    (tmp_path / "photos").mkdir()
    for seed in range(2):
        compose(1_000_000_007 + seed).image().save(tmp_path / "photos" / f"{seed}.png")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLX_VLM_PRUNE_CACHE": str(tmp_path)}
    assert len(commands()) == 4
    for command in commands():
        assert command[0] == "mlx-vlm-prune"
        done = subprocess.run(
            [sys.executable, "-m", "mlx_vlm_prune", *command[1:]], cwd=tmp_path,
            capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stderr)
    assert (tmp_path / "figures/accuracy-by-time.svg").is_file()
    assert (tmp_path / "figures/dashboard.html").is_file()


def test_every_flag_of_the_page_exists():
    sweep = build_sweep_parser(DEFAULT_METHODS, DEFAULT_RATIOS)
    known = {*sweep.flags.values(), *build_parser().flags.values(), "--rows"}
    evaluate = {"--per-kind", "--first-token"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE)) <= known | evaluate
