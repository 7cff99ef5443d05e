"""Promises of the speed benchmark: fair turns, honest spreads, one JSON line with every figure."""

import json

import pytest

from benchmarks import model_shapes, speed
from benchmarks.timing import Run
from mlx_vlm_prune.checkpoints.config import CLIPConfig, MiniMindConfig, VLMConfig
from mlx_vlm_prune.machine.timing import Gain, alternate, spread, turns

# Published: the language models' and projectors' numbers of parameters.
PUBLISHED = {
    "minimind2-v-small": (25_829_888, 393_728),
    "minimind2-v": (104_030_976, 590_592),
    "minimind-3v": (63_912_192, 1_182_720),
}
PARTS = {"image", "vision", "pruner", "projector", "prefill", "total", "token"}


@pytest.fixture
def tiny(monkeypatch):
    """A shape that takes no time, named tiny: 16 visual tokens."""
    config = VLMConfig(CLIPConfig(32, 48, 3, 2, 64, 16), MiniMindConfig(48, 64, 4, 4, 2, 128))
    monkeypatch.setitem(model_shapes.SHAPES, "tiny", config)


def measured(capsys, *more: str) -> dict:
    """The result of a short run, from its last line."""
    pruners = ["--pruner", "norm", "--pruner", "fastv"]
    speed.main(["--shape", "tiny", *pruners, "--runs", "3", "--tokens", "4", *more])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_the_last_line_is_json_with_every_figure_of_either_backend(tiny, capsys, backend):
    result = measured(capsys, "--backend", backend, "--keep-tokens", "12")
    assert result.keys() >= {"backend", "device", "dtype", "runs", "machine", "versions", "rows"}
    assert [row["pruner"] for row in result["rows"]] == ["norm", "fastv"]
    for row in result["rows"]:
        assert (row["tokens"], row["budget"]) == (16, 12)
        for kind in ("full", "pruned"):
            assert row["ms"][kind].keys() == PARTS
            for figures in row["ms"][kind].values():
                assert figures["p10"] <= figures["median"] <= figures["p90"]
        assert row["gain"].keys() == set(speed.TIMED)
        assert row["cache_bytes"]["pruned"] < row["cache_bytes"]["full"]
        assert row["operations"]["pruned"]["prefill"] < row["operations"]["full"]["prefill"]


def test_an_impossible_case_is_reported_and_the_rest_is_measured(tiny, capsys):
    result = measured(capsys, "--keep-tokens", "2")
    assert [row["pruner"] for row in result["rows"]] == ["norm"]
    assert [case["pruner"] for case in result["refused"]] == ["fastv"]


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_every_answer_has_as_many_tokens_since_nothing_ends_it(tiny, backend):
    module, config = speed.backend(backend), model_shapes.shape("tiny")
    stack = module.Stack(config, "float32")
    request = model_shapes.request(config, 9, 2)
    for spec, K in (("none", 16), ("norm", 4)):
        run = stack.run(request, speed.plan(spec), K, 7)
        assert [len(ids) for ids in run.token_ids] == [1 + 7] * 2  # the first, and 7 timed ones


def test_full_goes_before_every_few_pruned_ones_and_warm_up_is_not_counted():
    assert list(turns(5, 2)) == [None, 0, 1, None, 2, 3, None, 4]
    order = []

    def runs(name):
        def run() -> Run:
            order.append(name)
            return Run({}, 0.0, len(order), None, [])

        return run

    counted = list(alternate(runs("full"), [runs(0), runs(1)], 2, 1, share=1, title="runs"))
    assert order == ["full", 0, "full", 1] * 3
    assert [i for i, _, _ in counted] == [0, 1, 0, 1]
    assert all(run.cache_bytes == full.cache_bytes + 1 for _, run, full in counted)


def test_a_gain_is_reported_only_where_it_is_larger_than_its_spread():
    clear = Gain.of([200, 202, 198, 200], [100, 100, 100, 100])
    assert clear.is_clear and clear.report(2.5)["of_predicted"] == pytest.approx(0.8)
    once = Gain.of([200], [100])
    assert not once.is_clear and once.report(2.5)["realised"] is None  # who knows what spread?
    noisy = Gain.of([100, 140, 80, 110], [100, 100, 100, 100])
    assert not noisy.is_clear
    report = noisy.report(1.1)
    assert report["realised"] is None and report["of_predicted"] is None
    assert report["p10"] < 1 < report["p90"]


def test_the_spread_of_one_value_is_that_value():
    assert spread([3.0]) == {"median": 3.0, "p10": 3.0, "p90": 3.0}
    assert spread([1.0, 2.0, 9.0])["median"] == 2.0


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_shapes_have_the_published_numbers_of_parameters(name):
    counts = model_shapes.parameter_counts(model_shapes.shape(name))
    assert (counts["language"], counts["projector"]) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--shape", "minimind9"], "no shape is called 'minimind9'"),
        (["--pruner", "none"], "name another"),
        (["--keep-ratio", "0.5", "--keep-tokens", "3"], "not both"),
        (["--keep-tokens", "196"], "keep 1 to 195"),
        (["--keep-ratio", "2"], "'2' is not a number above 0 and below 1"),
    ],
)
def test_a_mistake_ends_in_one_sentence(capsys, argv, sentence):
    with pytest.raises(SystemExit) as stop:
        speed.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert sentence in err and err.count("\n") == 1
