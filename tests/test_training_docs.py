"""Promises of docs/training.md: its commands run, one after another, and its names are true."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.scenes_data import build_parser as data_parser
from mlx_vlm_prune.train import build_parser
from mlx_vlm_prune.training.config import DEFAULTS, TrainConfig
from mlx_vlm_prune.training.metrics import read_rows
from torch_ref.train_scenes import build_parser as scenes_parser

from .training_runs import write_data

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = {
    "--all",
    "--questions",
    "--per-kind",
}
PAGE = (ROOT / "docs/training.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    text = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.S)).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line]


def test_every_command_of_the_page_runs(tmp_path):
    write_data(tmp_path / "my-data", train=4, valid=2)
    shutil.copy(ROOT / "docs/train.yaml", tmp_path)
    assert len(commands()) >= 6
    for command in commands():
        assert command[0] == "mlx-vlm-prune"
        done = subprocess.run(
            [sys.executable, "-m", "mlx_vlm_prune", *command[1:]], cwd=tmp_path,
            capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stderr)
    steps = [row["iteration"] for row in read_rows(tmp_path / "from-yaml/metrics.jsonl")]
    assert steps[-1] == 6 and (tmp_path / "from-yaml/curve.png").exists()
    assert (tmp_path / "my-adapters/adapters.safetensors").exists()


def test_every_flag_of_the_page_exists():
    known = {
        *build_parser().flags.values(),
        "--model",
        "--save-path",
        "--dequantize",
        "--image",
        "--prompt",
        "--help",
        "--backend",
        "--nproc-per-node",
        "--save",
        *BENCHMARKS,
        *scenes_parser().flags.values(),
        *data_parser().flags.values(),
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE)) <= known


def test_the_defaults_of_the_stages_are_those_of_the_page():
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|[^|]*\| (.*?) \|$", PAGE, re.M)
    shown = {stage: text for names, text in rows for stage in re.findall(r"\w+", names)}
    for stage, defaults in DEFAULTS.items():
        passes = f"{defaults.get('epochs', 1):g} pass"
        rate, size = defaults["learning_rate"], defaults.get("batch_size", TrainConfig.batch_size)
        text = shown[stage]
        assert passes in text and f"{size} at once" in text
        assert float(re.findall(r"rate (\S+),", text)[0]) == rate, stage
