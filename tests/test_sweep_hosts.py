"""Promises of `sweep` in mlx-vlm's models: figures by image, operations of the language model."""

import json

import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

from mlx import nn

from mlx_vlm_prune import generate, load, sweep
from mlx_vlm_prune.hosts.families import host_of
from mlx_vlm_prune.planning import operations
from mlx_vlm_prune.planning.host_operations import language_sizes

from . import host_folders, llava
from .host_models import KINDS, TEXT

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
NAMES = ("llava", "qwen2_5_vl")


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    return host_folders.desk(tmp_path_factory.mktemp("desk"), NAMES)


def run(desk, name: str, out, *more: str) -> dict:
    sweep.main([
        "--model", str(desk / name), "--image", str(desk / "a.png"), str(desk / "b.png"),
        "--prompt", "w1 w2", "--json", str(out), "--runs", "2", "--max-tokens", "3", *more,
    ])  # fmt: skip
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_every_image_has_its_own_budget_and_the_towers_operations_are_left_out(
    desk, name, tmp_path, capsys
):
    more = ["--pruner", "norm", "divprune", "downsample", "--keep-ratio", "0.5"]
    result = run(desk, name, tmp_path / "r.json", *more)
    assert result["operations_cover"] == "the language model"
    assert [row["pruner"] for row in result["rows"]] == ["none", "norm", "divprune"]
    assert [refusal["pruner"] for refusal in result["refused"]] == ["downsample"]
    full, *pruned = result["rows"]
    assert full["ms"]["vision"] is None  # mlx-vlm computes it together with the prefill
    for row in pruned:
        assert row["keep_ratio"] == 0.5
        for answer, whole in zip(row["answers"], full["answers"], strict=True):
            assert answer["kept"] == answer["visual_tokens"] // 2
            assert answer["visual_tokens"] == whole["visual_tokens"] == whole["kept"]
        assert row["operations"]["prefill"] < full["operations"]["prefill"]
        assert row["gain"]["first_token"]["predicted"] is None
        assert row["cache_saved"] == pytest.approx(1 - row["cache_bytes"] / full["cache_bytes"])
    out = capsys.readouterr().out
    assert "multiply-adds of the language model" in out and "Refused: downsample" in out


def test_a_number_of_tokens_is_at_most_an_images(desk, tmp_path):
    """The two pictures have 9 and 8 tokens in a Qwen."""
    result = run(desk, "qwen2_5_vl", tmp_path / "r.json", "--pruner", "norm", "--keep-tokens", "9")
    sizes = [answer["visual_tokens"] for answer in result["rows"][0]["answers"]]
    kept = [answer["kept"] for answer in result["rows"][1]["answers"]]
    assert kept == [min(9, N) for N in sizes]


def test_decoder_methods_are_counted_layer_by_layer(desk, tmp_path):
    """Of the rows that `generate` reports of every layer."""
    full, row = run(
        desk, "llava", tmp_path / "r.json", "--pruner", "fastv", "--keep-ratio", "0.75"
    )["rows"]  # fmt: skip
    model, processor = load(desk / "llava")
    sizes = language_sizes(host_of(model, processor))
    for spec, counted in (("none", full), ("fastv", row)):
        ratio = counted["keep_ratio"]
        answer = generate(
            model, processor, "w1 w2", desk / "a.png", pruner=spec, keep_ratio=ratio, max_tokens=1
        )
        text = round(full["prompt_tokens"]) - full["of"]
        visual = [run["visual_tokens"] for run in answer.layers
                  for _ in range(run["first"], run["last"] + 1)]  # fmt: skip
        assert len(visual) == sizes.num_hidden_layers
        rows = [text + tokens for tokens in visual]
        assert counted["operations"]["prefill"] == operations.prefill(sizes, rows)
        assert counted["operations"]["decode"] == operations.decode(sizes, [n + 1 for n in rows])
    assert len({*visual}) == 2


def test_the_sizes_of_a_language_model_are_those_of_its_config():
    model = KINDS["llava"].make()
    sizes = language_sizes(host_of(model))
    D, inner = TEXT["hidden_size"], TEXT["intermediate_size"]
    heads, groups = TEXT["num_attention_heads"], TEXT["num_key_value_heads"]
    assert (sizes.hidden_size, sizes.vocab_size) == (D, TEXT["vocab_size"])
    assert (sizes.num_attention_heads, sizes.num_key_value_heads) == (heads, groups)
    assert sizes.num_hidden_layers == TEXT["num_hidden_layers"]
    assert sizes.layer_size == 2 * D * D + 2 * D * (D * groups // heads) + 3 * D * inner


def test_quantized_matrices_have_the_size_of_what_they_stand_for():
    model = KINDS["llava"].make()
    before = language_sizes(host_of(model))
    nn.quantize(
        model.language_model, group_size=32, bits=4,
        class_predicate=lambda _, m: isinstance(m, nn.Linear) and m.weight.shape[-1] % 32 == 0,
    )  # fmt: skip
    assert any(isinstance(m, nn.QuantizedLinear) for m in model.modules())
    assert language_sizes(host_of(model)) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_familys_language_model_can_be_counted_unless_it_says_why_not(kind):
    host = host_of(KINDS[kind].make())
    sizes = language_sizes(host)
    if host.why_not_counted:
        assert sizes is None
    else:
        assert sizes and sizes.layer_size > 0 and sizes.num_attention_heads > 0


def test_matrices_alone_count_as_a_config_does(tmp_path):
    ours, _ = load(llava.write(llava.random_model(), tmp_path / "ours"), dtype="float32")
    text = ours.config.text
    sizes = operations.MatrixSizes(
        text.hidden_size, text.num_hidden_layers, text.vocab_size, text.num_attention_heads,
        text.num_key_value_heads, text.head_dim,
        layer_size=operations._linear(text),
    )  # fmt: skip
    rows = [20, 20, 11]
    assert operations.prefill(sizes, rows) == operations.prefill(text, rows)
    assert operations.decode(sizes, rows) == operations.decode(text, rows)
