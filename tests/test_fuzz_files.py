"""Promises about a thousand damaged files of each kind: every one ends in an answer or in one
sentence, within bounds of time and memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CASES = 1000
KINDS = ("picture", "archive", "header", "learned", "adapter")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    command = [sys.executable, "-m", "tests.fuzz_files", str(folder), str(CASES)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout)


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_damaged_files_end_in_an_answer_or_a_sentence(kind, results):
    result = results[kind]
    assert not result["faults"], "\n".join(result["faults"])
    assert result["answered"] + result["refused"] == CASES
    assert min(result["answered"], result["refused"]) >= CASES // 40  # else little is proved
