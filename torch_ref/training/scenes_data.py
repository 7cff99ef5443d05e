"""Scenes as training batches: pictures, patch targets, and packed questions.

The only file here that touches `mlx_vlm_prune`, and of it only the scenes: pictures
and words are data, which both frameworks must share. No MLX is imported.

Shapes: B pictures, N patches, L tokens of the prompt and all its questions.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from mlx_vlm_prune import scenes
from mlx_vlm_prune.scenes.questions import content
from mlx_vlm_prune.scenes.vocabulary import IMAGE_TOKEN, PLACES, SLOTS, tokenizer, words

IGNORE = -100
PATCH = 16
SIDE = scenes.SIZE // PATCH
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
STD = (0.26862954, 0.26130258, 0.27577711)
# How often each kind is asked: the slow ones more often.
MIX = {
    "existence": 2,
    "colour": 2,
    "counting": 3,
    "relation": 3,
    "grounding": 2,
    "reading": 2,
    "content": 2,
}


def vocabulary() -> dict[str, int]:
    return {word: i for i, word in enumerate(words())}


@dataclass(frozen=True)
class DenseWords:
    """The words a patch must predict, by group, and how many things CLS must name."""

    groups: dict[str, list[int]]
    summary: int


@cache
def dense_words() -> DenseWords:
    ids = vocabulary()
    letters = [*scenes.LETTERS.lower(), *("##" + x for x in scenes.LETTERS.lower())]
    groups = {
        "kind": [*scenes.SHAPES, "sign", "nothing"],
        "tint": list(scenes.COLOURS),
        "cell": list(scenes.CELLS),
        "place": list(PLACES),
        "letter": letters,
        "slot": list(SLOTS),
    }
    summary = len(scenes.SHAPES) * len(scenes.COLOURS) + 1
    return DenseWords({name: [ids[w] for w in group] for name, group in groups.items()}, summary)


def patch_targets(scene: scenes.Scene) -> np.ndarray:
    """What each patch holds: (N, 6) positions within the groups of dense_words."""
    centre = (np.arange(SIDE) + 0.5) * PATCH
    y, x = (v.ravel() for v in np.meshgrid(centre, centre, indexing="ij"))
    target = np.full((SIDE**2, 6), IGNORE)
    target[:, 0] = len(scenes.SHAPES) + 1
    side = scenes.SIZE // scenes.GRID
    target[:, 2] = (y // side * scenes.GRID + x // side).astype(int)
    for thing in scene.things:
        distance = np.hypot(x - thing.x, y - thing.y)
        target[(distance < thing.radius + 11), 0] = IGNORE  # partly covered
        middle = int(thing.y // PATCH) * SIDE + int(thing.x // PATCH)
        on = distance < 0.8 * thing.radius + 3
        on[middle] = True
        target[on, 0] = scenes.SHAPES.index(thing.shape)
        target[on, 1] = list(scenes.COLOURS).index(thing.colour)
        target[on, 2] = scenes.CELLS.index(thing.cell)
        target[on, 3] = 0
        target[middle, 3] = 1
    if scene.sign:
        _sign_targets(scene.sign, x, y, target)
    return target


def _sign_targets(sign: scenes.Sign, x: np.ndarray, y: np.ndarray, target: np.ndarray) -> None:
    half_w, half_h = sign.half_size
    near = (np.abs(x - sign.x) < half_w + 8) & (np.abs(y - sign.y) < half_h + 8)
    target[near, 0] = IGNORE
    board = (np.abs(x - sign.x) < half_w - 2) & (np.abs(y - sign.y) < half_h - 2)
    target[board, 0] = len(scenes.SHAPES)
    for i, letter in enumerate(sign.text):
        offset = np.abs(x - (sign.x + (i - 1) * sign.pitch))
        on = (offset < sign.pitch / 2 - 2) & (np.abs(y - sign.y) < sign.height / 2 + 2)
        target[on, 4] = scenes.LETTERS.index(letter) + (len(scenes.LETTERS) if i else 0)
        target[on, 5] = i


@dataclass
class Batch:
    """Tensors of B scenes; a question's tokens carry its number, the prompt's carry -1."""

    pixels: Tensor  # (B, 3, 224, 224)
    dense: Tensor  # (B, N, 6)
    summary: Tensor  # (B, things)
    ids: Tensor  # (B, L)
    positions: Tensor  # (B, L)
    branch: Tensor  # (B, L); -2 is padding
    answer_at: Tensor  # places in B*L whose next token is an answer's
    targets: Tensor  # those next tokens
    answer_of: Tensor  # the question of each
    kinds: list[str]
    first_visual: int

    def visible(self) -> Tensor:
        """Who sees whom, (B, L, L): the prompt, and one's own question so far."""
        same = self.branch[:, :, None] == self.branch[:, None, :]
        prompt = (self.branch == -1)[:, None, :]
        L = self.ids.shape[1]
        return (same | prompt) & torch.ones(L, L, dtype=torch.bool, device=self.ids.device).tril()

    def to(self, device: torch.device) -> "Batch":
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            is_tensor = isinstance(value, Tensor)
            moved[field.name] = value.to(device, non_blocking=True) if is_tensor else value
        if moved["pixels"].dtype == torch.uint8:
            mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (MEAN, STD))
            moved["pixels"] = (moved["pixels"].float() / 255 - mean) / std
        return Batch(**moved)


class Packer:
    """Lays a prompt and many questions into one row of tokens."""

    def __init__(self) -> None:
        self.tokenizer = tokenizer()
        self.encoded: dict[str, list[int]] = {}  # texts that were met before
        self.prompt = self.encode("<|im_start|>user\n" + IMAGE_TOKEN * SIDE**2 + "\n")
        self.first_visual = self.prompt.index(vocabulary()[IMAGE_TOKEN])

    def encode(self, text: str) -> list[int]:
        if text not in self.encoded:
            self.encoded[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.encoded[text]

    def question(self, question: scenes.Question) -> tuple[list[int], list[int]]:
        """Token ids of the question with the turn marks, and of the answer with its end."""
        turn = self.encode("<|im_end|>\n<|im_start|>assistant\n")
        return self.encode(question.text) + turn, self.encode(question.answer) + turn[:1]

    def pack(self, batch: list[tuple[scenes.Scene, list[scenes.Question]]]) -> Batch:
        rows = [self._row(questions) for _, questions in batch]
        L = max(len(ids) for ids, *_ in rows)
        B = len(rows)
        ids, positions, branch = np.zeros((B, L), int), np.zeros((B, L), int), np.full((B, L), -2)
        at, targets, of = [], [], []
        kinds: list[str] = []
        for b, ((row, place, branches, answers), (_, questions)) in enumerate(
            zip(rows, batch, strict=True)
        ):
            n = len(row)
            ids[b, :n], positions[b, :n], branch[b, :n] = row, place, branches
            for where, token, q in answers:
                at.append(b * L + where)
                targets.append(token)
                of.append(len(kinds) + q)
            kinds += [q.kind for q in questions]
        pixels = np.stack([np.asarray(scene.image()) for scene, _ in batch]).transpose(0, 3, 1, 2)
        dense = np.stack([patch_targets(scene) for scene, _ in batch])
        summary = np.stack([self._summary(scene) for scene, _ in batch])
        t = torch.from_numpy
        return Batch(
            t(pixels.copy()), t(dense), t(summary), t(ids), t(positions), t(branch),
            torch.tensor(at), torch.tensor(targets), torch.tensor(of), kinds, self.first_visual,
        )  # fmt: skip

    def _row(self, questions: list[scenes.Question]):
        ids, start = list(self.prompt), len(self.prompt)
        places, branches, answers = list(range(start)), [-1] * start, []
        for q, question in enumerate(questions):
            prompt, answer = self.question(question)
            first = len(ids) + len(prompt) - 1  # the token that predicts the answer's first
            answers += [(first + i, token, q) for i, token in enumerate(answer)]
            fed = prompt + answer[:-1]
            ids += fed
            places += range(start, start + len(fed))
            branches += [q] * len(fed)
        return ids, places, branches, answers

    @staticmethod
    def _summary(scene: scenes.Scene) -> np.ndarray:
        present = np.zeros(dense_words().summary, np.float32)
        for thing in scene.things:
            shape = scenes.SHAPES.index(thing.shape)
            present[shape * len(scenes.COLOURS) + list(scenes.COLOURS).index(thing.colour)] = 1
        present[-1] = scene.sign is not None
        return present


class ScenesBatches(IterableDataset):
    """Endless training batches; batch number i is the same in every run."""

    def __init__(self, batch: int, question_tokens: int, first: int = 0) -> None:
        self.batch, self.question_tokens, self.first = batch, question_tokens, first

    def __iter__(self) -> Iterator[Batch]:
        packer, info = Packer(), get_worker_info()
        number = self.first + (info.id if info else 0)
        while True:
            yield packer.pack([self._ask(packer, seed) for seed in self.seeds(number)])
            number += info.num_workers if info else 1

    def seeds(self, number: int) -> range:
        """The scenes of batch `number`, never held-out ones."""
        seeds = scenes.TRAIN_SEEDS[number * self.batch : (number + 1) * self.batch]
        assert len(seeds) == self.batch, "all training seeds are used up"
        return seeds

    def _ask(self, packer: Packer, seed: int) -> tuple[scenes.Scene, list[scenes.Question]]:
        scene, rng = scenes.compose(seed), np.random.default_rng([seed, 3])
        kinds, odds = list(MIX), np.array(list(MIX.values())) / sum(MIX.values())
        questions, room = [], self.question_tokens
        for kind in rng.choice(kinds, 64, p=odds):
            question = content(scene, rng) if kind == "content" else scenes.ask(scene, kind, rng)
            if question is None or question in questions:
                continue
            room -= sum(map(len, packer.question(question))) - 1
            if room < 0:
                break
            questions.append(question)
        return scene, questions


def judge_batches(per_kind: int, batch: int) -> Iterator[Batch]:
    """The held-out questions, packed."""
    packer, waiting = Packer(), []
    for scene_questions in scenes.question_set(scenes.HELD_OUT_SEEDS, per_kind):
        waiting.append(scene_questions)
        if len(waiting) == batch:
            yield packer.pack(waiting)
            waiting = []
    if waiting:
        yield packer.pack(waiting)
