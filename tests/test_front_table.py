"""Promises of what the README says of a GPU: one named result, and only what it holds."""

import json

import pytest

from benchmarks import command_line, front_table

RESULT = json.loads((command_line.RESULTS / f"{front_table.GPU_RESULT}.json").read_text())


def sentences(folder, rows, name=front_table.GPU_RESULT):
    """What is said of a result with such rows: shape, visual tokens, budget, method, gain."""
    whole = [
        {"shape": shape, "tokens": N, "budget": K, "pruner": name,
         "gain": {"total": {"realised": gain}}}
        for shape, N, K, name, gain in rows
    ]  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps({**RESULT, "rows": whole}))
    return front_table._gpu_sentences(folder)


def test_it_is_the_largest_shape_with_most_tokens_whatever_was_measured_first(tmp_path):
    rows = [
        ("minimind2-v-small", 576, 144, "divprune", 9.0),
        ("llava-7b", 256, 64, "divprune", 8.0),
        ("llava-7b", 576, 144, "divprune", 1.5),
        ("llava-7b", 576, 144, "tome", None),
        ("llava-7b", 576, 288, "norm", 7.0),
        ("llava-7b-4", 2304, 576, "divprune", 6.0),
    ]
    (text,) = sentences(tmp_path, rows)
    assert text.endswith("first token: `divprune` 1.50x. No clear difference: `tome`.")
    assert "shape of llava-7b, 144 of 576 tokens" in text


def test_it_says_how_often_and_at_which_commit_it_was_measured(tmp_path):
    (text,) = sentences(tmp_path, [("llava-7b", 576, 144, "divprune", 1.5)])
    assert f"commit {RESULT['commit']}, " in text and f"median of {RESULT['runs']} runs" in text


@pytest.mark.parametrize("rows", [[], [("llava-7b", 576, 288, "divprune", 1.5)]])
def test_a_result_without_a_quarter_is_left_out(tmp_path, rows):
    assert sentences(tmp_path, rows) == []


def test_without_a_clear_gain_it_says_so(tmp_path):
    (text,) = sentences(tmp_path, [("llava-7b", 576, 144, "divprune", None)])
    assert text.endswith("Speedup of the first token: no clear difference with `divprune`.")


def test_another_machines_result_changes_nothing(tmp_path):
    assert sentences(tmp_path, [("llava-7b", 576, 144, "tome", 2.0)], "device-mine") == []
