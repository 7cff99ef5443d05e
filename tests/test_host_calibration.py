"""Budgets of mlx-vlm's models: what is predicted, by hand on a made-up calibration, and its runs.

No measured time is asserted. In the made-up one the tower takes 10 ms a visual token, a pruner 1 ms
an image, the language model 1 ms a row, and pictures of 4 and of 16 tokens were run.
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.compatibility import check_pipeline
from mlx_vlm_prune.hosts.families import host_of
from mlx_vlm_prune.hosts.prepared_inputs import ProcessorOptions
from mlx_vlm_prune.hosts.prompt import budgets_by_view, encode_images, prune_prompt, share_budget
from mlx_vlm_prune.planning import host_runs
from mlx_vlm_prune.planning.budgets import Budget, Workload, choose, forecast
from mlx_vlm_prune.planning.calibration import LONG_TEXT, SHORT_TEXT
from mlx_vlm_prune.planning.host_budgets import (
    predictor,
)
from mlx_vlm_prune.planning.host_calibration import (
    RESIZE,
    HostCalibration,
    ImagesCalibration,
    SizedRun,
)
from mlx_vlm_prune.planning.host_runs import HostPrompt, feasible_budgets
from mlx_vlm_prune.pruners import plan

from . import calibrations
from .calibrations import MB
from .host_models import KINDS, cached_models

MODELS = cached_models()
ROW_BYTES = 1000


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    return calibrations.isolate(monkeypatch, tmp_path / "cache")


def run(K: int, N: int, text: int = SHORT_TEXT, images: int = 1, **ms: float) -> SizedRun:
    rows = text + images * K
    usual = {"vision": 10.0 * N * images, "pruner": float(K < N) * images, "prefill": float(rows)}
    nbytes = {"vision": N * MB * images, "pruner": 0, "prefill": rows * MB}
    return SizedRun(K, text, images, usual | ms, nbytes, N, rows, ROW_BYTES * rows, 0)


SMALL = tuple(run(K, 4) for K in (1, 2, 3, 4))
LARGE = (*(run(K, 16) for K in (1, 4, 8, 15, 16)), run(4, 16, LONG_TEXT), run(16, 16, LONG_TEXT))
PICTURES = ((20, 20, 4), (40, 40, 16))


def never(*_):
    raise AssertionError("the saved calibration must be used")


def made_up(*runs: SizedRun, pictures=PICTURES) -> HostCalibration:
    return HostCalibration("norm", pictures, runs or SMALL + LARGE, {})


def of_images(*tokens: int, calibration=None, full_rows: int | None = None) -> ImagesCalibration:
    return ImagesCalibration(calibration or made_up(), tokens, full_rows or sum(tokens))


def workload(text: int = SHORT_TEXT, images: int = 1) -> Workload:
    return Workload(text, images, 5.0, 100 * MB, 1)


def test_an_image_lies_between_the_sizes_that_were_run():
    """10 tokens are half way from 4 to 16: 100 ms; what is smaller than all takes as long as 4."""
    expected = {"vision": 100, "pruner": 1, "prefill": 13}
    assert of_images(10).ms(5, 8, 1) == pytest.approx(expected)
    assert of_images(10).ms(10, 8, 1) == pytest.approx({"vision": 100, "pruner": 0, "prefill": 18})
    assert of_images(2).ms(2, 8, 1)["vision"] == pytest.approx(40)
    assert of_images(16).ms(16, 8, 1)["vision"] == pytest.approx(160)


def test_images_of_different_sizes_add_up_and_a_small_one_keeps_all():
    """Of 10 and 4 tokens, 6 of each at most: 10 rows; the second image is not pruned."""
    two = of_images(10, 4)
    assert (two.N, two.rows(6, 8, 2)) == (10, 18)
    assert two.ms(6, 8, 2) == pytest.approx({"vision": 140, "pruner": 1, "prefill": 18})


def test_several_images_at_once_take_less_than_one_by_one():
    """Two of 16 in 240 ms in place of 320: so do two of any size."""
    both = [run(K, 16, images=2, vision=240.0) for K in (4, 16)]
    calibration = made_up(*SMALL, *LARGE, *both)
    assert of_images(10, 16, calibration=calibration).ms(4, 8, 2)["vision"] == pytest.approx(195)


def test_a_pruner_that_reads_the_text_takes_longer_with_more_of_it():
    slow = [run(4, 16, LONG_TEXT, pruner=4.0), run(16, 16, LONG_TEXT)]
    calibration = made_up(*SMALL, *LARGE[:-2], *slow)
    middle = (SHORT_TEXT + LONG_TEXT) // 2
    assert of_images(10, calibration=calibration).ms(4, middle, 1)["pruner"] == pytest.approx(2.5)


def test_a_tower_inside_which_tokens_leave_takes_less_and_holds_less_with_fewer():
    """5 ms for each of N and 5 for each of K: 8 of 16 take 120, 2 of 4 take 30."""
    inside = [
        replace(run(r.K, r.N, r.text, vision=5.0 * (r.N + r.K)), held_bytes=r.K * MB)
        for r in SMALL + LARGE
    ]
    calibration = replace(made_up(*inside), in_tower=True)
    of_16, of_10 = (of_images(n, calibration=calibration) for n in (16, 10))
    assert of_16.in_tower and not of_images(16).in_tower
    assert of_16.ms(8, 8, 1)["vision"] == pytest.approx(120)
    assert of_10.ms(5, 8, 1)["vision"] == pytest.approx(75)
    assert of_16.ms(16, 8, 1)["vision"] == pytest.approx(160)
    assert calibration.held_bytes(16, 0.5) == 8 * MB and calibration.held_bytes(10, 0.5) == 5 * MB
    choice = choose(of_16, Budget(ms=130), workload(), range(1, 16))
    assert choice.K == 6  # 5, 80, 1 and 8 leave 36 of 130 ms, and a token takes 5 and 1
    reason = choose(of_16, Budget(ms=50), workload(), range(1, 16)).reason
    assert "the vision tower alone" not in reason


def test_k_is_the_largest_within_the_time_and_its_rows_are_those_that_are_read():
    """5 for the image, 100, 1 and 8 for the text leave 6 of 120 ms: one token a millisecond."""
    choice = choose(of_images(10), Budget(ms=120), workload(), range(1, 10))
    assert (choice.K, choice.N, choice.reason) == (6, 10, "")
    assert choice.options == {"pruner": "norm", "keep_tokens": 6}
    full = choose(of_images(10), Budget(ms=123), workload(), range(1, 10))
    assert full.options == {"pruner": "none", "keep_tokens": 10}


def test_many_k_are_predicted_at_once_as_one_by_one():
    two = of_images(10, 16)
    together = two.ms(np.array([1, 9, 10, 16]), 30, 2)
    for i, K in enumerate((1, 9, 10, 16)):
        assert {part: ms[i] for part, ms in together.items()} == pytest.approx(two.ms(K, 30, 2))


def test_memory_is_the_held_bytes_and_the_most_of_any_part():
    """The text and 13 of 16 tokens take 21 MB of the prefill; the tower 16; 1 % is slack."""
    (expected,) = forecast(of_images(16), workload(), 13)
    assert expected.gb == pytest.approx((100 + 1.01 * 21) / 1000)


def test_what_the_towers_output_holds_is_held_for_each_image():
    """A MB a token of each picture, beside a MB a row."""
    held = [replace(run, held_bytes=run.N * MB, nbytes=run.nbytes | {
        "prefill": (run.rows + run.N) * MB}) for run in SMALL + LARGE]  # fmt: skip
    two = of_images(10, 16, calibration=made_up(*held)).nbytes(4, 8, 2)
    assert two["prefill"] == pytest.approx((8 + 2 * 4 + 26) * MB)


def test_rows_that_only_a_full_image_has_are_counted_there_alone():
    twice = of_images(10, full_rows=20)
    assert [int(twice.rows(K, 8, 1)) for K in (9, 10)] == [17, 28]


def test_the_reason_names_a_smaller_image_only_where_its_size_matters():
    choice = choose(of_images(10), Budget(ms=90), workload(), range(1, 10))
    assert choice.K == 10
    assert choice.reason.endswith(f"the image and the vision tower alone take 105 ms; {RESIZE}")
    one_size = made_up(*LARGE, pictures=PICTURES[1:])
    half_a_picture = made_up(pictures=((40, 20, 4), *PICTURES[1:]))
    for calibration in (one_size, half_a_picture):
        of_16 = of_images(16, calibration=calibration)
        choice = choose(of_16, Budget(ms=90), workload(), range(1, 16))
        assert choice.reason.endswith("alone take 165 ms")


# With models.


def prompt_of(kind: str, spec: str = "none", images: int | None = None) -> HostPrompt:
    """A prompt of the family's tiny model, as its processor would make it."""
    model = MODELS(kind)
    host, pipeline, inputs = host_of(model), plan(spec), KINDS[kind].inputs(model, images)
    policy = check_pipeline(host, pipeline, None)
    views = host_runs.tokens_by_view(host, inputs)
    return HostPrompt(host, pipeline, policy, ProcessorOptions(), inputs, views, None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_that_are_predicted_are_those_that_the_language_model_reads(kind):
    """At every K that the images can keep, and with all tokens."""
    prompt = prompt_of(kind, "norm")
    host, inputs = prompt.host, prompt.inputs
    predicted, none = predictor(prompt, made_up()), plan("none")
    views = encode_images(host, inputs, none)
    assert [sum(len(v.signals.x_BND[0]) for v in views if v.image == i)
            for i in range(len(prompt.tokens))] == [*prompt.tokens]  # fmt: skip
    feasible = prompt.feasible
    for K in {feasible[0], feasible[len(feasible) // 2], feasible[-1], max(prompt.tokens)}:
        pipeline = prompt.pipeline if max(prompt.tokens) > K else none
        budgets = budgets_by_view(views, None, K, pipeline) if pipeline is not none else [
            len(view.signals.x_BND[0]) for view in views
        ]  # fmt: skip
        read = prune_prompt(host, inputs, views, pipeline, budgets, prompt.policy)
        assert int(predicted.rows(K, prompt.text, len(prompt.tokens))) == read.length, K


@pytest.mark.parametrize("kind", KINDS)
def test_the_tower_is_not_computed_to_count_its_tokens(kind):
    host, inputs = host_of(MODELS(kind)), KINDS[kind].inputs(MODELS(kind))

    def peak(compute) -> int:
        mx.eval(inputs.pixels)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        compute()
        return mx.get_peak_memory() - before

    def encode() -> None:
        mx.eval([view.signals.x_BND for view in encode_images(host, inputs, plan("none"))])

    assert peak(lambda: host_runs.tokens_by_view(host, inputs)) < peak(encode) / 2


def test_tiles_of_an_image_keep_at_least_one_token_each():
    host = host_of(MODELS("internvl_chat"))
    assert feasible_budgets(host, plan("norm"), [[4, 4, 4]]) == list(range(3, 12))
    assert feasible_budgets(host, plan("norm"), [[16], [4]]) == list(range(1, 16))
    assert feasible_budgets(host, plan("patch_norm:keep=4+norm"), [[16]]) == [1, 2, 3, 4]
    with pytest.raises(UserError, match="one visual token of this model"):
        feasible_budgets(host, plan("norm"), [[1]])


@pytest.mark.parametrize("views", [[[4, 4, 4]], [[16], [4]], [[9, 6, 1], [5, 2]], [[7, 3, 3, 2]]])
def test_what_can_be_kept_is_known_without_trying_each_number(monkeypatch, views):
    def can_keep(K: int, sizes: list[int]) -> bool:
        try:
            return sum(sizes) <= K or bool(share_budget(K, sizes))
        except UserError:
            return False

    N = max(map(sum, views))
    expected = [K for K in range(1, N) if all(can_keep(K, sizes) for sizes in views)]
    monkeypatch.setattr(host_runs, "share_budget", never)
    assert feasible_budgets(host_of(MODELS("llava")), plan("norm"), views) == expected
    prompt = prompt_of("internvl_chat", "norm")
    assert prompt.feasible is prompt.feasible


def test_an_image_of_as_many_crops_as_tokens_cannot_be_pruned():
    with pytest.raises(UserError, match="an image in 3 crops cannot keep 2 visual tokens"):
        feasible_budgets(host_of(MODELS("llava")), plan("norm"), [[1, 1, 1]])


def test_layers_with_a_window_bound_the_rows_of_a_method_between_them(monkeypatch):
    between, behind = prompt_of("gemma3", "fastv"), prompt_of("gemma3", "norm")
    monkeypatch.setattr(type(between.host.language_layers), "window", 300)
    assert between.most_rows == 299
    assert behind.most_rows == behind.host.context == 512


def test_a_decoder_method_has_only_averages_that_its_schedule_allows():
    """Three layers, the first of which holds all 16: an average of K leaves 3 K - 16 after it, of
    which two layers share, and one must be left."""
    host = host_of(MODELS("llava"))
    assert feasible_budgets(host, plan("fastv"), [[16]]) == list(range(6, 16))
