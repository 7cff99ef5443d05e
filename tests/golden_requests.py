"""Runs seeded requests for test_golden_requests.py; their figures without times and versions.

`make_folder` makes the folder that requests run in: tiny random models, images and questions.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import torch
from PIL import Image

from mlx_vlm_prune import evaluate, load, pruned, stream_generate
from mlx_vlm_prune.generate import main as generate_command
from mlx_vlm_prune.generation.overlay import LONG_SIDE

from . import tiny

BLOCKS = 16  # of an overlay, along each side
MAX_TOKENS = "10"
NOISE = {"a": (80, 90), "b": (120, 60), "c": (50, 40)}
# A scene of 64 colours, seed 1_000_000_002: Pillow draws letters otherwise from release to release.
SIGN = Path(__file__).parent / "goldens" / "sign.png"
TIMES = ("prompt_tps", "generation_tps", "peak_memory_gb", "versions")
RUN_FIELDS = (
    "machine", "versions", "seconds", "questions", "model", "model_key", "date", "question_set"
)  # fmt: skip
PIECE_FIELDS = ("text", "token", "finish_reason", "generation_tokens")
DRAFT_FIELDS = ("drafted", "accepted")  # of the whole answer, so of its last piece


def make_folder(folder: Path) -> Path:
    """Write images, questions and a tiny model in our layout into a folder; the folder."""
    for letter, (height, width) in NOISE.items():
        noise = np.random.default_rng(height).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{letter}.png")
    shutil.copy(SIGN, folder / "x.png")
    _write_questions(folder / "ours.jsonl", ["is it red ?", "where is the star ?"], "yes")
    _write_questions(folder / "theirs.jsonl", ["w7 w9", "w9 w3 w4"], "w3")
    temporary, model = folder / "making", tiny.reference()
    temporary.mkdir()
    # Without this it repeats one token: its output layer is its embedding.
    model.language.norm.weight.data = _norm_weights(tiny.TEXT.hidden_size)
    tiny.checkpoint(tiny.taught(model, noise=0.02), temporary).rename(folder / "tiny")
    return folder


def add_llavas(folder: Path) -> None:
    """Write LLaVAs that our decoder runs."""
    from . import llava

    for name, kind in {"vicuna": "vicuna", "qwen2": "qwen2 and siglip"}.items():
        model = llava.random_model(kind)
        model.model.language_model.norm.weight.data = _norm_weights(
            llava.SIZES["hidden_size"], seed=9
        )
        llava.write(model, folder / name)


def add_hosts(folder: Path) -> None:
    """Write models that mlx-vlm runs."""
    from . import host_folders

    for name in ("llava", "qwen2_5_vl", "smolvlm"):
        host_folders.checkpoint(name, folder)
    file = folder / "qwen2_5_vl" / "model.safetensors"
    weights = dict(mx.load(str(file)))
    norm = "language_model.model.norm.weight"
    weights[norm] = mx.array(_norm_weights(weights[norm].size).numpy())
    mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})


def _norm_weights(size: int, seed: int = 5) -> torch.Tensor:
    """Random weights of a last norm, with which answers repeat themselves less."""
    return 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def _write_questions(file: Path, texts: list[str], answer: str) -> None:
    rows = [
        {"id": f"q{n}", "image": f"{'abc'[n % 3]}.png", "question": text, "answer": answer}
        for n, text in enumerate(texts * 2)
    ]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def answer(
    model: str, images: str, prompt: str, flags: str, folder: Path, overlay: bool = False
) -> dict[str, Any]:
    """What `generate` writes: a model in the folder, or the built-in one ("scenes"), about images
    named by letters; with a digest of the overlay if `overlay`."""
    figures, drawn = folder / "figures.json", folder / "picture.png"
    command = ["--prompt", prompt, "--json", str(figures), "--max-tokens", MAX_TOKENS]
    command += [*_model(model, folder), *(["--overlay", str(drawn)] if overlay else [])]
    command += [part for letter in images for part in ("--image", str(folder / f"{letter}.png"))]
    generate_command([*command, *shlex.split(flags)])
    return without_times(_read(figures)) | ({"overlay": digest(drawn)} if overlay else {})


def sampled(*request: Any) -> dict[str, Any]:
    """An answer, and MLX's samples for eight keys, which differ between its releases."""
    logits_1V = mx.arange(100)[None] / 20
    draws = [mx.random.categorical(logits_1V, key=mx.random.key(n)).item() for n in range(8)]
    return answer(*request) | {"draws": draws}


def _model(name: str, folder: Path) -> list[str]:
    return ["--dtype", "float32", *(["--model", str(folder / name)] if name != "scenes" else [])]


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def compare(folder: Path) -> dict[str, Any]:
    """What the command writes for full beside pruned, in a new process."""
    command = [sys.executable, "-m", "mlx_vlm_prune.generate", "--image", "x.png", "--prompt",
               "What does the sign say?", "--pruner", "cls_attention", "--keep-ratio", "0.5",
               "--compare", "--json", "both.json", "--overlay", "kept.png"]  # fmt: skip
    subprocess.run([*command, "--dtype", "float32"], cwd=folder, capture_output=True, check=True)
    picture = Image.open(folder / "kept.png")
    panels = picture.crop((0, 0, picture.width, LONG_SIDE))  # without times below them
    panels.save(folder / "panels.png")
    return without_times(_read(folder / "both.json")) | {"overlay": digest(folder / "panels.png")}


def without_times(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures without times and versions, and of `ttft_ms` the names of its parts.

    Figures that are left out must not be None.
    """
    assert all(figures[name] is not None for name in TIMES)
    rest = {name: value for name, value in figures.items() if name not in (*TIMES, "comparison")}
    rest["ttft_ms"] = [*figures["ttft_ms"]]
    return rest | ({"full": without_times(figures["full"])} if "full" in figures else {})


def digest(file: Path) -> dict[str, Any]:
    """An image's size, and the mean colours of its BLOCKS x BLOCKS parts in hexadecimal."""
    with Image.open(file) as picture:
        small = picture.convert("RGB").resize((BLOCKS, BLOCKS), Image.Resampling.BOX)
        return {"size": [*picture.size], "blocks": small.tobytes().hex()}


def stream(name: str, prompt: str, folder: Path) -> dict[str, Any]:
    """Every piece of an answer, from the Python API."""
    model, processor = load(None if name == "scenes" else folder / name, dtype="float32")
    pieces = stream_generate(
        model, processor, prompt, [folder / "x.png"], pruner="norm", keep_ratio=0.7, max_tokens=5
    )
    rows = [
        [getattr(piece, field) for field in PIECE_FIELDS]
        + [piece.result and getattr(piece.result, field) for field in DRAFT_FIELDS]
        for piece in pieces
    ]
    return {"pieces": rows}


def evaluation(model: str, pruners: str, flags: str, folder: Path) -> dict[str, Any]:
    """What `evaluate` writes; the questions are a file in the folder."""
    out, arguments = folder / "evaluation.json", shlex.split(flags)
    out.unlink(missing_ok=True)  # another model's is not replaced
    command = [str(folder / a) if a.endswith(".jsonl") else a for a in arguments]
    command += [part for pruner in pruners.split() for part in ("--pruner", pruner)]
    command += [*_model(model, folder), "--max-tokens", "4", "--out", str(out)]
    out.unlink(missing_ok=True)  # another model's result is not replaced
    with mock.patch.dict(os.environ, MLX_VLM_PRUNE_CACHE=str(folder / "cache")):
        evaluate.main(command)
    return {
        name: value
        for name, value in _read(out).items()
        if name not in RUN_FIELDS and name != "texts"  # of which loyalty and accuracy tell
    }


class EndlessTokenizer:
    """A tokenizer without an end-of-sequence token."""

    def __init__(self) -> None:
        self.stopping_criteria = self

    def add_eos_token_ids(self, ids: Any) -> None: ...

    def __call__(self, token: int) -> bool:
        return False


def batch(kind: str, folder: Path) -> dict[str, Any]:
    """Two prompts with images, batched by mlx-vlm's engine inside `pruned`.

    The first has one image, the second all; the same prompt twice for families with one image, or
    that batch equal lengths only.
    """
    from mlx_vlm.generate.ar import BatchGenerator

    from .host_models import KINDS

    model, has_several = KINDS[kind].make(), len(KINDS[kind].tiles) > 1
    with pruned(model, "vispruner", keep_ratio=0.4) as report:
        engine, uids = BatchGenerator(model.language_model, EndlessTokenizer(), max_tokens=6), []
        for images in (1, None if has_several else 1):
            inputs = KINDS[kind].inputs(model, images)
            embeds = model.get_input_embeddings(
                mx.array(inputs.ids)[None], inputs.pixels, mask=inputs.mask_1L, **inputs.extra
            ).to_dict()
            rows = {name: value for name, value in embeds.items() if value is not None}
            uids += engine.insert([inputs.ids], prompt_kwargs=[{**inputs.extra, **rows}])
        pieces = []
        while engine.has_work:
            pieces += engine.next()[1]
        engine.close()
    return {
        "report": [report.pruner, report.positions, report.total, report.kept, str(report)],
        "prompts": [
            [p.total, p.kept, p.kept_indices, p.rows, p.tower_skipped] for p in report.prompts
        ],
        "token_ids": [[piece.token for piece in pieces if piece.uid == uid] for uid in uids],
        "logprobs": [
            [float(piece.token_logprob) for piece in pieces if piece.uid == uid] for uid in uids
        ],
    }
