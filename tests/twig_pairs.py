"""Pairs of a base and a twig in both frameworks, and answers with and without speculation.

Shapes: I images, L rows, V words.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import torch

from mlx_vlm_prune.generation.speculation import Speculation
from mlx_vlm_prune.hosts.loading import load
from mlx_vlm_prune.models.layers import TwigReader
from mlx_vlm_prune.pruners import plan
from torch_ref.models.language.twig import Twig, grown
from torch_ref.models.vlm import VLM, VLMConfig

from . import tiny

TEXT = replace(tiny.TEXT, num_hidden_layers=5)
K, LONGEST = 9, 24  # tokens of an answer
SPECS = ["none", "twig", "fastv", "cls_attention", "avgpool", "cls_attention+restore", "tome+vtw"]
PROMPT = tiny.row("user # what is left of # ?")
NO_END: frozenset[int] = frozenset()


def identical_twig(language, layer: int) -> Twig:
    """All the base's layers above: it says what the base says."""
    return grown(language, layer, len(language.layers) - layer)


def noisy_twig(language, layer: int, noise: float) -> Twig:
    twig = identical_twig(language, layer)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in twig.parameters():
            parameter.data += noise * torch.randn_like(parameter)
    return twig.eval()


TWIGS = {
    "perfect": lambda language: identical_twig(language, 2),
    "nearly": lambda language: noisy_twig(language, 1, 0.02),
    "short": lambda language: grown(language, 1, 1),
    "wrong": lambda language: noisy_twig(language, 2, 0.3),
}


def build_pairs(new_folder: Callable[[str], Path]) -> dict[str, SimpleNamespace]:
    """A base of five layers with each of the twigs, in both frameworks."""
    torch.manual_seed(1)
    base = VLM(VLMConfig(tiny.VISION, TEXT, image_token_id=tiny.IMAGE)).eval()
    for parameter in base.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    # Otherwise it repeats its last word: the output layer is the embedding.
    base.language.norm.weight.data = 3 * torch.randn(TEXT.hidden_size)
    folder = tiny.checkpoint(base, new_folder("base"))
    pixels = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    pairs: dict[str, SimpleNamespace] = {}
    answers: dict[tuple, list[int]] = {}
    for name, make_twig in TWIGS.items():
        reference = VLM(base.config).eval()
        reference.load_state_dict(base.state_dict())
        reference.learned = {"twig": make_twig(reference.language)}
        mlx_folder = new_folder(name) / "mlx"
        shutil.copytree(folder, mlx_folder)
        tiny.write_learned(reference, mlx_folder)
        model, _ = load(mlx_folder, dtype="float32")
        pairs[name] = SimpleNamespace(
            ours=model,
            theirs=reference,
            pixels=pixels,
            folder=mlx_folder,
            name=name,
            answers=answers,
        )
    return pairs


def K_of(spec: str) -> int:
    return tiny.N if spec == "none" else K


def read_prompt(
    pair, spec: str, prompt=PROMPT, twig: TwigReader | None = None, chain=None, policy=None
):
    """The prompt with its images."""
    pixels = mx.array(pair.pixels[: len(prompt.runs)]) if prompt.runs else None
    chain = chain or plan(spec, pair.ours.learned)
    return pair.ours([prompt], pixels, chain, K_of(spec), policy, twig=twig)


def answer_once(pair, spec: str, *others: Any, answer: Callable[[], list[int]]) -> list[int]:
    """The base's answer without speculation, computed once: the twig beside it counts only where
    it chooses what is kept."""
    key = (pair.name if "twig" in spec else None, spec, *others)
    if key not in pair.answers:
        pair.answers[key] = answer()
    return pair.answers[key]


def greedy(pair, spec: str, limit: int, prompt=PROMPT) -> list[int]:
    """A token at a time, as without a twig."""

    def answer() -> list[int]:
        before = read_prompt(pair, spec, prompt)
        token_11 = mx.argmax(before.logits_BLV[:, -1], -1, keepdims=True)
        ids = [token_11.item()]
        for _ in range(LONGEST - 1):
            logits_1LV = before.step(token_11)
            token_11 = mx.argmax(logits_1LV[:, -1], -1, keepdims=True)
            ids.append(token_11.item())
        return ids

    return answer_once(pair, spec, tuple(prompt.ids), answer=answer)[:limit]


def start_speculation(
    pair,
    spec: str,
    max_draft=5,
    min_probability=0.6,
    ends=NO_END,
    prompt=PROMPT,
    chain=None,
    policy=None,
):
    """A speculation and the first token; its drafts are appended to `drafts`."""
    reader = TwigReader(pair.ours.learned["twig"])
    before = read_prompt(pair, spec, prompt, reader, chain, policy)
    speculation = Speculation(before, reader, ends, max_draft, min_probability)
    speculation.drafts, draft = [], speculation.draft

    def recording_draft(*arguments):
        drafted, states = draft(*arguments)
        speculation.drafts.append(drafted)
        return drafted, states

    speculation.draft = recording_draft  # of this instance
    return speculation, int(mx.argmax(before.logits_BLV[0, -1]).item())


def generated(speculation: Speculation, first: int, limit: int) -> list:
    """The tokens up to the end, as an answer has them."""
    tokens = []
    for token in speculation.tokens(first, limit):
        tokens.append(token)
        if token.id in speculation.ends:
            break
    return tokens


def up_to_end(ids: list[int], ends) -> list[int]:
    return next((ids[: n + 1] for n, one in enumerate(ids) if one in ends), ids)
