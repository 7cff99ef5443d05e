"""Promises of docs/evaluation.md: its commands run, one after another.

Those of lmms-eval run in tests/test_lmms_eval.py, mlx-vlm's benchmarks in
tests/test_mlx_vlm_evals.py.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from .training_runs import write_data

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    text = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.S))
    lines = [line for line in text.splitlines() if line and not line.startswith("lmms-eval eval ")]
    return [shlex.split(line, comments=True) for line in lines]


def write_coco(folder: Path, pictures: Path) -> None:
    """COCO's captions of two pictures."""
    (folder / "val2017").mkdir(parents=True)
    records = {"images": [], "annotations": []}
    for n, picture in enumerate([*sorted(pictures.glob("*.png"))[:2]]):
        shutil.copy(picture, folder / "val2017")
        records["images"].append({"id": n, "file_name": picture.name})
        records["annotations"].append({"image_id": n, "caption": f"{n} red stars"})
    (folder / "captions_val2017.json").write_text(json.dumps(records))


def test_every_command_of_the_page_runs(tmp_path):
    write_data(tmp_path / "my-data", train=2, valid=4)
    write_coco(tmp_path / "coco", tmp_path / "my-data")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLX_VLM_PRUNE_CACHE": str(tmp_path)}
    printed = []
    for command in commands():
        assert command[:2] == ["mlx-vlm-prune", "evaluate"]
        done = subprocess.run(
            [sys.executable, "-m", "mlx_vlm_prune", *command[1:]], cwd=tmp_path,
            capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stderr)
        printed.append(done.stdout)
    assert len(printed) == 7
    for text, column in zip(
        printed, ("overall", "overall", "first, ms", "tokens/s", "", "Rel.", "CIDEr"), strict=True
    ):
        assert column in text
