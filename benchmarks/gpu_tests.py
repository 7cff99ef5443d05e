"""Run the tests whose answers a GPU could change: `python -m benchmarks.gpu_tests`.

`make test-metal` is the same. They compute on MLX's default device, without the network, and
compare with numpy, with recorded answers, or with the same in blocks. PyTorch makes their tiny
models, on the CPU. On a machine without a GPU nothing is run.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from mlx_vlm_prune.checkpoints.errors import UserError

from .command_line import parser, positive, run_command
from .device_ceilings import is_gpu

ROOT = Path(__file__).parent.parent
TESTS = [
    f"tests/test_{name}.py"
    for name in (
        "goldens", "golden_requests", "choices", "choices_float32", "pruners", "rotary", "chains",
        "first_logits", "launches", "mamba_layer", "answers", "batch_generate", "generate",
    )
]  # fmt: skip  # what tells most comes first
SECONDS = 240
NEEDS = ("torch", "pytest", "pytest-timeout", "hypothesis")


def run_tests(seconds: int, tests: Sequence[str] = TESTS) -> dict[str, Any]:
    """How many passed, were skipped and failed, and which failed, within so many seconds.

    Raises UserError where pytest cannot be run.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-p", "no:cacheprovider", "--session-timeout", str(seconds)]
        options += ["--continue-on-collection-errors", f"--junit-xml={report}"]
        command = [sys.executable, "-m", "pytest", *options, *tests]
        code = subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode
        if not report.is_file():
            raise UserError(f"the tests cannot be run: pip install {' '.join(NEEDS)}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or _is_broken(case)]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped), "skipped": len(skipped),
        "failed": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
        "is_whole": code in (0, 1) and time.monotonic() - begin < seconds, "exit_code": code,
        "seconds": round(time.monotonic() - begin, 1),
    }  # fmt: skip


def _is_broken(case: ElementTree.Element) -> bool:
    return case.find("error") is not None


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the tests. Raises UserError where there is no GPU, or a test fails."""
    if not is_gpu():
        raise UserError("MLX has no GPU on this machine; `make test` runs all tests on its CPU")
    outcome = run_tests(args.seconds)
    print(sentence(outcome))
    if outcome["failed"]:
        raise UserError(f"failed on this GPU: {', '.join(outcome['failed'])}")
    return {"benchmark": "gpu_tests", **outcome}


def sentence(outcome: dict[str, Any]) -> str:
    """The outcome in words."""
    counts = f"{outcome['passed']} passed, {outcome['skipped']} skipped"
    code = outcome.get("exit_code", 1)  # of pytest; 0 and 1 when it came to its end
    why = "time was over" if code in (0, 1) else f"pytest ended with code {code}"
    end = "" if outcome["is_whole"] else f"; {why} before the last"
    return f"Tests on the GPU: {counts}, {len(outcome['failed'])} failed{end}."


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = parser("gpu_tests", __doc__)
    p.add_argument("--seconds", type=positive, default=SECONDS, help="until the tests are ended")
    return p.parse_args(argv)


main = partial(run_command, parse, run)


if __name__ == "__main__":
    main()
