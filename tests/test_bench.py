"""Promises of `bench`: a clone's benchmarks by name, and a sentence where there is no clone."""

import re

import pytest

from mlx_vlm_prune import bench
from mlx_vlm_prune.__main__ import main
from mlx_vlm_prune.checkpoints import clone

from .entry_points import modules, start_python, write_user_files


def test_without_a_name_every_benchmark_is_listed_with_its_first_sentence(capsys):
    main(["bench"])
    lines = capsys.readouterr().out.splitlines()
    commands = [name for name, is_command in modules("benchmarks") if is_command]
    assert [f"benchmarks.{line.split()[0]}" for line in lines] == commands
    assert all(len(line.split()) > 3 and "python -m" not in line for line in lines)


def test_a_benchmark_gets_its_own_arguments_and_its_usage_is_what_was_typed(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bin/mlx-vlm-prune"])
    with pytest.raises(SystemExit) as stop:
        main(["bench", "scenes-data", "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: mlx-vlm-prune bench scenes-data [-h]")


def test_an_unknown_benchmark_is_refused_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "devise"])
    assert stop.value.code == 2
    assert re.match("error: no benchmark is called 'devise'; .*device", capsys.readouterr().err)


def test_where_no_benchmarks_lie_beside_the_package_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clone, "HOME", tmp_path)
    for arguments in ([], ["device"]):
        with pytest.raises(SystemExit) as stop:
            main(["bench", *arguments])
        assert (stop.value.code, capsys.readouterr().err) == (2, f"error: {bench.NEEDS_CLONE}\n")


def test_a_strangers_benchmarks_beside_the_installed_package_are_not_run(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").write_text("raise AssertionError('was run')\n")
    monkeypatch.setattr(clone, "HOME", tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["bench", "device"])
    assert (stop.value.code, capsys.readouterr().err) == (2, f"error: {bench.NEEDS_CLONE}\n")


def test_no_file_of_the_users_is_taken_for_the_benchmarks(tmp_path):
    folder = write_user_files(tmp_path / "user", "mlx_vlm_prune")
    done = start_python(folder, "-m", "mlx_vlm_prune", "bench", "device", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: python -m mlx_vlm_prune bench device [-h]")
