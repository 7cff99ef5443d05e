"""Promises of the workflows: what they run exists, and only the upload may ask for a token."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import device, device_report, gpu_tests

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".github" / "workflows"
NAMES = sorted(file.name for file in FOLDER.glob("*.yml"))


def workflow(name: str) -> dict:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def lines(job: dict) -> list[str]:
    """Every command line of a job."""
    return [line for step in job["steps"] for line in step.get("run", "").splitlines()]


def test_there_are_two():
    assert NAMES == ["ci.yml", "release.yml"]


@pytest.mark.parametrize("name", NAMES)
def test_actionlint_has_nothing_to_say(name):
    program = shutil.which("actionlint") or shutil.which(
        "actionlint", path=str(Path(sys.executable).parent)
    )
    if program is None:
        pytest.skip("actionlint is not installed")
    done = subprocess.run([program, "-no-color", FOLDER / name], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def test_on_linux_it_is_what_anyone_can_run():
    assert lines(workflow("ci.yml")["jobs"]["linux"]) == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100


def test_on_a_mac_with_its_gpu_the_figures_are_kept():
    job = workflow("ci.yml")["jobs"]["macos"]
    assert job["runs-on"].startswith("macos-")
    *makes, measure = lines(job)
    assert makes == ["make demo", "make test-metal", "make test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{line.split()[1]}:", makefile, re.M) for line in makes)
    python, *arguments = measure.split()
    assert python == ".venv/bin/python" and arguments[:2] == ["-m", "benchmarks.device"]
    args = device.parse(arguments[2:])
    assert args.minutes == 2 and args.tokens == [576]
    kept = job["steps"][-1]["with"]["path"]
    assert ROOT / kept == device.result_file(args)


def test_only_the_upload_of_a_tag_may_ask_for_a_token_and_none_is_kept():
    release = workflow("release.yml")
    assert release[True] == {"push": {"tags": ["v*"]}}  # YAML reads `on` as true
    for name in NAMES:
        assert workflow(name)["permissions"] == {"contents": "read"}
        assert "secrets." not in (FOLDER / name).read_text(encoding="utf-8")
    jobs = release["jobs"]
    allowed = {name: job.get("permissions") for name, job in jobs.items()}
    assert allowed == {"build": None, "publish": {"id-token": "write"}}
    assert jobs["publish"]["needs"] == "build" and jobs["publish"]["environment"]["name"] == "pypi"
    assert any("twine check --strict" in line for line in lines(jobs["build"]))


def test_a_tag_that_is_not_the_version_stops_a_release(tmp_path):
    command = lines(workflow("release.yml")["jobs"]["build"])[0]
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"$', text, re.M)[1]
    for tag, code in ((f"v{version}", 0), (version, 1), ("v9.9.9", 1)):
        env = os.environ | {"GITHUB_REF_NAME": tag}
        assert subprocess.run(["sh", "-c", command], cwd=tmp_path, env=env).returncode == code, tag


def test_the_forms_of_issues_are_whole_and_a_report_names_its_own():
    forms = ROOT / ".github" / "ISSUE_TEMPLATE"
    assert (forms / device_report.TEMPLATE).is_file()
    for file in forms.glob("[!c]*.yml"):
        form = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= form.keys()
        fields = [part for part in form["body"] if part["type"] != "markdown"]
        assert len({part["id"] for part in fields}) == len(fields) > 1
        assert all(part["attributes"]["label"] for part in fields)


def test_every_test_of_a_gpu_is_there():
    assert all((ROOT / name).is_file() for name in gpu_tests.TESTS)
