"""Test and measure this machine, and say where the figures can be sent: `make report`.

On a GPU first the tests of `make test-metal`, in a third of the time; then `benchmarks.device` in
the rest. Their outcome joins the result, benchmarks/results/device-NAME.json, and docs/devices.md
is written again.
"""

import argparse
import json
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from mlx_vlm_prune.checkpoints.command_line import Parser, in_one_sentence
from mlx_vlm_prune.checkpoints.reading.files import write_atomically
from mlx_vlm_prune.machine import blas

from . import command_line, device, gpu_tests
from .device_page import page

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "devices.md"
TEMPLATE = "device.yml"  # of .github/ISSUE_TEMPLATE
MINUTES = 10.0


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a UserError ends in one sentence and exit code 2."""
    with in_one_sentence():
        args = parse(argv)
        blas.load()  # reports a BLAS that the user named and that cannot be loaded
        run(args)


def run(args: argparse.Namespace) -> None:
    """Test, measure, write, and print where to send the file."""
    begin, tests = time.monotonic(), None
    if device.is_gpu():
        tests = gpu_tests.run_tests(max(1, int(args.minutes * 60 / 3)))
        print(gpu_tests.sentence(tests), flush=True)
    else:
        print("MLX has no GPU on this machine: its tests are left out.", flush=True)
    args.measuring.minutes = max(0.1, args.minutes - (time.monotonic() - begin) / 60)
    result = {**device.run(args.measuring), "tests": tests}
    file = device.result_file(args.measuring)
    write_atomically(file, json.dumps(result) + "\n")
    write_atomically(PAGE, page(command_line.RESULTS))
    print(where_to_send(file, origin()))


def origin() -> str | None:
    """The address that the clone came from; where that is a fork, its remote `upstream`."""
    for remote in ("upstream", "origin"):
        command = ["git", "remote", "get-url", remote]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        except OSError:
            return None
        if address := done.stdout.strip():
            return address
    return None


def web_page(address: str) -> str | None:
    """The page of the repository at an address of git's; None where that is a folder, say.

    Nothing of who logs in is left: people paste the page into issues.
    """
    url = re.sub(r"^(?:[^@/]+@)?([\w.-]+):(?!//)", r"ssh://\1/", address)  # git@host:owner/name
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port and parts.scheme == "https" else ""
    except ValueError:
        return None
    if parts.scheme not in ("https", "ssh") or "." not in (parts.hostname or ""):
        return None
    return f"https://{parts.hostname}{port}/{parts.path.strip('/').removesuffix('.git')}"


def where_to_send(file: Path, address: str | None) -> str:
    """What to do with the result, for the page of the repository at an address, if it has one."""
    web = web_page(address or "")
    if web is None:
        where = "the project that this clone came from, in an issue or a pull request"
    else:
        where = f"{web}/issues/new?template={TEMPLATE}"
    return f"Please send {file}\nto {where}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser("benchmarks.device_report", description=(__doc__ or "").split("\n\n")[0])
    p.add_argument("--minutes", type=device.minutes, default=MINUTES, help="for all of it")
    p.add_argument("--name", type=command_line.plain_name, help="of the result (default: the"
                   " device's)")  # fmt: skip
    args = p.parse_args(argv)
    args.measuring = device.parse(["--name", args.name] if args.name else [])
    return args


if __name__ == "__main__":
    main()
