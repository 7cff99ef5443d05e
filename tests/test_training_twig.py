"""Promises of a trained twig: it lies beside the model, prunes, and drafts as the reference's."""

from mlx_vlm_prune import generate
from mlx_vlm_prune.checkpoints.reading.files import open_safetensors
from mlx_vlm_prune.hosts.loading import load
from mlx_vlm_prune.scenes import compose
from mlx_vlm_prune.training.run import train
from tests import stage_runs, tiny
from torch_ref.training.run import train as train_in_torch

QUESTION = stage_runs.QUESTION


def drafts(folder) -> list[tuple[int, int]]:
    """Drafted and accepted words of some answers."""
    model, processor = load(str(folder))
    results = [
        generate(model, processor, QUESTION, compose(i).image(), max_tokens=12, num_draft_tokens=3)
        for i in range(3)
    ]
    return [(result.drafted, result.accepted) for result in results]


def answer(folder, **options) -> str:
    model, processor = load(str(folder))
    return generate(model, processor, QUESTION, compose(0).image(), max_tokens=3, **options).text


def test_a_twig_lies_beside_the_model_prunes_and_drafts(tmp_path, caplog):
    """The base learns the data first, so that it says what the twig drafts."""
    random = tiny.checkpoint(tiny.reference(), tmp_path)
    data = stage_runs.write(tmp_path)
    plain = tmp_path / "plain"
    train(stage_runs.config("sft", random, data, plain, iters=40, learning_rate=3e-3))
    out = tmp_path / "out"
    keys = {"twig_layer": 1, "twig_layers": 2, "iters": 30}
    train(stage_runs.config("twig", plain, data, out, **keys))
    twig = open_safetensors(out / "pruners.safetensors")
    assert twig["twig.layer"].floats() == [1] and twig["twig.head.weight"].dtype == "F32"
    assert answer(out, num_draft_tokens=3) == answer(plain)
    answer(out, pruner="twig", keep_tokens=8)
    # The reference's own training ends at the same twig, whose drafts are taken as often.
    train_in_torch(stage_runs.config("twig", plain, data, tmp_path / "theirs", **keys))
    assert drafts(tmp_path / "theirs") == drafts(out)
    assert sum(accepted for _, accepted in drafts(out)) > 0
    # A scorer trained next lies beside it, and another twig takes its place.
    train(stage_runs.config("pruner", out, data, tmp_path / "b", pruner="mlp", keep_tokens=4))
    both = open_safetensors(tmp_path / "b/pruners.safetensors")
    assert {name.split(".")[0] for name in both} == {"mlp", "twig"}
    assert all(both[name] == twig[name] for name in twig)
    keys = {"twig_layer": 1, "twig_layers": 1}
    train(stage_runs.config("twig", tmp_path / "b", data, tmp_path / "c", **keys))
    assert "trained for what the model was before" not in caplog.text
    shorter = open_safetensors(tmp_path / "c/pruners.safetensors")
    assert not [name for name in shorter if name.startswith("twig.layers.1.")]
    train(stage_runs.config("pretrain", tmp_path / "c", data, tmp_path / "d"))
    assert "mlp, twig: trained for what the model was before" in caplog.text
