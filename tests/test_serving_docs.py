"""Promises of docs/serving.md: its commands run, and its fields and options exist."""

import ast
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from .entry_points import ROOT
from .serving import PATIENCE, Served, noise

pytest.importorskip("openai", reason="openai's client is not installed")

from mlx_vlm_prune.generation.arguments import build_serve_parser
from mlx_vlm_prune.serving.chat_request import DEFAULT_MAX_TOKENS
from mlx_vlm_prune.serving.refusals import CLIENT_GONE
from mlx_vlm_prune.serving.request_schema import ChatBody

PAGE = (ROOT / "docs/serving.md").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_every_command_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    noise(400, 400).save(tmp_path / "photo.png")  # too large for an argument of a command
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    start, *others = re.findall(r"```(bash|python)\n(.*?)```", PAGE, re.S)
    assert start[1].startswith("mlx-vlm-prune serve --model my-model ") and len(others) == 3
    words = start[1].replace(" --model my-model", "").split()[1:]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_vlm_prune", *words, "--port", port],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr and f":{port}/v1" in process.stderr.readline()
        outputs = []
        for kind, text in others:
            command = ["bash", "-c"] if kind == "bash" else [sys.executable, "-c"]
            done = subprocess.run(
                [*command, text.replace("8080", port)], cwd=tmp_path, capture_output=True,
                text=True, timeout=PATIENCE,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            outputs.append(done.stdout)
        assert '"visual_tokens_kept": 49' in outputs[0] and "'total': " in outputs[1]
        assert 'mlx_vlm_prune_requests_total{status="200"} 2' in outputs[2]
        assert Served(int(port)).call("/health")[0] == 200
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_every_option_and_field_of_the_page_exists():
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE))
    assert flags and flags <= {*build_serve_parser(1).flags.values()}
    table = PAGE.split("| field | meaning |")[1].split("\n\n")[0]
    fields = set(re.findall(r"^\| `(\w+)`", table, re.M)) - {"detail"}
    assert len(fields) == 5 and fields <= ChatBody.model_fields.keys()
    assert f"Without `max_tokens` an answer ends after {DEFAULT_MAX_TOKENS} tokens." in PAGE
    statuses = set(re.findall(r"(?<!\d)([45]\d\d)\s\(", PAGE))
    files = (ROOT / "mlx_vlm_prune/serving").glob("*.py")
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text("utf-8")))]
    numbers = {node.value for node in nodes if isinstance(node, ast.Constant)}
    possible = {number for number in numbers if type(number) is int and 400 <= number < 600}
    assert {*map(int, statuses)} == possible - {CLIENT_GONE, DEFAULT_MAX_TOKENS}
    assert Path(ROOT / "docs/serving.md").stat().st_size < 6_500  # short
