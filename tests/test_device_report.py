"""Promises of `make report`: a GPU's tests and figures in one file, and where to send it."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from benchmarks import command_line, device, device_page, device_report, gpu_tests

from .distributions import BESIDE, PACKAGES, requirements

WEB = "https://github.com/owner/name/issues/new?template=device.yml"
OUTCOME = {"passed": 7, "skipped": 2, "failed": ["a::b"], "is_whole": True, "seconds": 1.0}
FAILING = """import pytest


def test_right(): ...


def test_wrong():
    assert 1 == 2


def test_elsewhere():
    pytest.skip("no")


@pytest.fixture
def broken():
    raise ValueError


def test_broken(broken): ...
"""
# Collects tests as where some packages are not installed.
COLLECT = """import json, sys
absent = {*json.loads(sys.argv[1])}


class Absent:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent)
import pytest
options = "--collect-only -qq -p no:cacheprovider -p pytest_timeout".split()
sys.exit(pytest.main([*options, *sys.argv[2:]]))
"""


@pytest.fixture
def report(monkeypatch, tmp_path):
    """The folder of results, and what is measured is a file written by nobody."""
    monkeypatch.setattr(command_line, "RESULTS", tmp_path)
    monkeypatch.setattr(device_report, "PAGE", tmp_path / "devices.md")
    monkeypatch.setattr(device_report, "page", lambda results: "the page")
    monkeypatch.setattr(device_report, "origin", lambda: "git@github.com:owner/name.git")
    minutes = []

    def measured(args):
        minutes.append(args.minutes)
        return {"benchmark": "device", "name": args.name}

    monkeypatch.setattr(device, "run", measured)
    return minutes


def test_on_a_gpu_its_tests_take_a_third_of_the_time_and_join_the_result(
    report, monkeypatch, capsys, tmp_path
):
    seconds = []
    monkeypatch.setattr(device, "is_gpu", lambda: True)
    monkeypatch.setattr(gpu_tests, "run_tests", lambda limit: seconds.append(limit) or OUTCOME)
    monkeypatch.setattr(device, "largest_that_fits", lambda *_: "minimind2-v")
    device_report.main(["--name", "a"])
    result = json.loads((tmp_path / "device-a.json").read_text())
    assert result == {"benchmark": "device", "name": "a", "tests": OUTCOME}
    assert seconds == [200] and 9.9 < report[0] <= 10
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Tests on the GPU: 7 passed, 2 skipped, 1 failed."
    assert lines[-2:] == [f"Please send {tmp_path / 'device-a.json'}", f"to {WEB}"]
    assert (tmp_path / "devices.md").read_text() == "the page"


def test_without_a_gpu_it_says_so_and_measures(report, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(device, "is_gpu", lambda: False)
    device_report.main(["--name", "a", "--minutes", "3"])
    assert json.loads((tmp_path / "device-a.json").read_text())["tests"] is None
    assert "MLX has no GPU on this machine" in capsys.readouterr().out and report[0] <= 3


@pytest.mark.parametrize(
    ("address", "where"),
    [
        ("git@github.com:owner/name.git", WEB),
        ("ssh://git@github.com/owner/name", WEB),
        ("https://github.com/owner/name.git", WEB),
        ("https://USER:TOKEN@github.com/owner/name.git/", WEB),
        ("https://USER:TOKEN@github.com/owner/name.git?a=TOKEN#TOKEN", WEB),
        ("ssh://git@github.com:22/owner/name.git", WEB),
        ("github.com:owner/name", WEB),
        ("https://github.com:port/owner/name", "in an issue or a pull request"),
        (None, "in an issue or a pull request"),
        ("../hub.git", "in an issue or a pull request"),
    ],
)
def test_the_place_to_send_it_to_is_the_page_of_the_clone(address, where):
    text = device_report.where_to_send(Path("device-a.json"), address)
    assert text.startswith("Please send device-a.json\nto ") and text.endswith(where)


def test_the_figures_of_a_fork_go_to_where_it_was_forked_from(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(device_report, "ROOT", tmp_path)
    git("init")
    assert device_report.origin() is None
    git("remote", "add", "origin", "https://github.com/user/name")
    assert device_report.origin() == "https://github.com/user/name"
    git("remote", "add", "upstream", "https://github.com/owner/name")
    assert device_report.origin() == "https://github.com/owner/name"


def test_the_page_says_what_the_tests_came_to():
    shown = list(device_page.tests({"tests": OUTCOME}))
    assert shown == ["Tests on the GPU: 7 passed, 2 skipped, 1 failed.\n\n- failed: `a::b`"]
    assert not list(device_page.tests({"tests": None})) and not list(device_page.tests({}))


def test_the_outcome_counts_and_names_the_tests(tmp_path):
    file = tmp_path / "test_few.py"
    file.write_text(FAILING)
    outcome = gpu_tests.run_tests(60, [str(file)])
    names = [name.rpartition("::")[2] for name in outcome["failed"]]
    assert (outcome["passed"], outcome["skipped"], names) == (1, 1, ["test_wrong", "test_broken"])
    assert outcome["is_whole"] and gpu_tests.sentence(outcome).endswith("2 failed.")


def test_when_time_is_over_the_tests_end(tmp_path):
    file = tmp_path / "test_slow.py"
    file.write_text("import time\n\ndef test_a(): time.sleep(1)\n\ndef test_b(): ...\n")
    outcome = gpu_tests.run_tests(1, [str(file)])
    assert outcome["passed"] == 1 and not outcome["is_whole"]
    assert gpu_tests.sentence(outcome).endswith("time was over before the last.")


def test_a_file_that_cannot_be_read_has_failed_and_the_others_are_run(tmp_path):
    files = [tmp_path / "test_broken.py", tmp_path / "test_few.py"]
    for file, text in zip(files, ("import no_such_module\n", FAILING), strict=True):
        file.write_text(text)
    outcome = gpu_tests.run_tests(60, [*map(str, files)])
    assert outcome["passed"] == 1 and len(outcome["failed"]) == 3 and outcome["is_whole"]


def test_what_ended_early_for_another_reason_says_so():
    words = gpu_tests.sentence({**OUTCOME, "is_whole": False, "exit_code": 3})
    assert words.endswith("1 failed; pytest ended with code 3 before the last.")


def test_what_make_installs_for_a_report_is_enough_to_read_its_tests():
    makefile = (gpu_tests.ROOT / "Makefile").read_text(encoding="utf-8")
    (line,) = re.findall(r"^\$\(VENV\)/\.report-ready:.*\n\t\$\(PIP\) (.*)$", makefile, re.M)
    _, project, *others = shlex.split(line)
    assert set(gpu_tests.NEEDS) <= set(others)
    needed = requirements([project.replace(".", "mlx_vlm_prune", 1), *others])
    installed = {canonicalize_name(each.metadata["Name"]) for each in needed}
    absent = {
        name
        for name, origins in packages_distributions().items()
        if not installed & {*map(canonicalize_name, origins)}
    } - {*PACKAGES, *BESIDE, *sys.stdlib_module_names}
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, json.dumps(sorted(absent)), *gpu_tests.TESTS],
        cwd=gpu_tests.ROOT, env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert {"transformers", "matplotlib", "mlx_vlm"} & absent and "torch" not in absent
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_without_a_gpu_its_tests_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(gpu_tests, "is_gpu", lambda: False)
    with pytest.raises(SystemExit) as stop:
        gpu_tests.main([])
    assert stop.value.code == 2 and "MLX has no GPU on this machine" in capsys.readouterr().err


def test_a_test_that_fails_on_the_gpu_is_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(gpu_tests, "is_gpu", lambda: True)
    monkeypatch.setattr(gpu_tests, "run_tests", lambda seconds: OUTCOME)
    with pytest.raises(SystemExit) as stop:
        gpu_tests.main([])
    assert stop.value.code == 2 and "failed on this GPU: a::b" in capsys.readouterr().err
