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


def test_on_linux_the_workflows_are_checked_and_every_python_that_make_looks_for_is_there():
    uses = {step.get("uses", "").rpartition(":")[0]: step for step in linux_steps()}
    assert "docker://rhysd/actionlint" in uses
    (setup,) = (step for step in linux_steps() if "actions/setup-python" in step.get("uses", ""))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    others = re.search(r"^PYTHONS := (.*)$", makefile, re.M)[1].split()
    assert setup["with"]["python-version"].split() == [*others, "3.12"]


def linux_steps() -> list[dict]:
    return workflow("ci.yml")["jobs"]["linux"]["steps"]


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
    assert allowed == {"test": None, "build": None, "publish": {"id-token": "write"}}
    assert jobs["publish"]["environment"]["name"] == "pypi"
    assert any("twine check --strict" in line for line in lines(jobs["build"]))


def test_nothing_is_uploaded_that_was_not_tested():
    jobs = workflow("release.yml")["jobs"]
    assert jobs["publish"]["needs"] == ["test", "build"]
    assert ROOT / jobs["test"]["uses"] == FOLDER / "ci.yml"
    assert "workflow_call" in workflow("ci.yml")[True]


def test_on_pypi_no_link_of_the_readme_is_relative(tmp_path):
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (command,) = (line for line in lines(workflow("release.yml")["jobs"]["build"])
                  if "public_address" in line)  # fmt: skip
    script = f"python() {{ '{sys.executable}' \"$@\"; }}; "
    script += command.replace(".ci/", f"'{ROOT}'/.ci/")
    env = os.environ | {"GITHUB_SERVER_URL": "https://git.example", "GITHUB_REF_NAME": "v1",
                        "GITHUB_REPOSITORY": "owner/name"}  # fmt: skip
    subprocess.run(["sh", "-c", script], cwd=tmp_path, env=env, check=True)
    links = r'(?:\]\(|src=")([^)"]+)[)"]'
    before = re.findall(links, (ROOT / "README.md").read_text(encoding="utf-8"))
    after = re.findall(links, (tmp_path / "README.md").read_text(encoding="utf-8"))
    base = "https://git.example/owner/name"
    assert f"{base}/blob/v1/docs/auto.md" in after and f"{base}/raw/v1/docs/kept.png" in after
    assert len(after) == len(before) and all(link.startswith(("https://", "#")) for link in after)
    text = (tmp_path / "pyproject.toml").read_text(encoding="utf-8")
    assert text.count("[project.urls]") == 1 and f'\nRepository = "{base}"\n' in text


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
