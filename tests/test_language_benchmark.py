"""Promises of the benchmark beside mlx-lm's language model: every format of weights, JSON last."""

import json

import pytest

from benchmarks import language, model_shapes
from mlx_vlm_prune.checkpoints.config import CLIPConfig, MiniMindConfig, VLMConfig

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

TEXT = {
    "tied": MiniMindConfig(128, 256, 3, 4, 2, 128),
    "untied": MiniMindConfig(128, 256, 2, 2, 2, 128, tie_word_embeddings=False),
}


@pytest.mark.parametrize("on_cpu", [True, False])
def test_every_format_is_compared_and_timed(monkeypatch, capsys, on_cpu):
    monkeypatch.setattr(language, "on_cpu", lambda: on_cpu)
    for name, text in TEXT.items():
        tiny = VLMConfig(CLIPConfig(32, 48, 2, 2, 64, 16), text)
        monkeypatch.setitem(model_shapes.SHAPES, name, tiny)
    shapes = [word for name in TEXT for word in ("--shape", name)]
    formats = [word for name in language.FORMATS for word in ("--weights", name)]
    language.main([*shapes, *formats, "--runs", "2", "--warmup", "0", "--tokens", "2"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["shape"], row["weights"], row["gaps"], row["part"]) for row in result["rows"]] == [
        (name, weights, gaps, part)
        for name in TEXT
        for weights in language.FORMATS
        for gaps in ((False,) if on_cpu else (False, True))
        for part in ("prefill", "token")
    ]
    assert result["versions"]["mlx-lm"] and result["device"]
    assert all(row["ours_ms"]["median"] > 0 for row in result["rows"])


def test_an_unknown_shape_is_refused_before_any_is_measured(capsys):
    with pytest.raises(SystemExit):
        language.main(["--shape", "minimind9"])
    assert "no shape is called 'minimind9'" in capsys.readouterr().err
