"""Drawn worlds as training batches: pictures, patch targets, and packed questions.

Shapes: B pictures, N patches, G groups of words, L tokens of the prompt and all its questions.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from mlx_vlm_prune import scenes
from mlx_vlm_prune.scenes.vocabulary import IMAGE_TOKEN, tokenizer

from .worlds import SMALL, Curriculum, World

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
STD = (0.26862954, 0.26130258, 0.27577711)
TRIES = 64  # kinds of question drawn for a picture, of which as many are asked as there is room for
Example = tuple[
    World, Any, list[scenes.Question]
]  # a picture's world, what is in it, its questions


@dataclass
class Batch:
    """Tensors of B pictures; a question's tokens carry its number, the prompt's carry -1."""

    pixels: Tensor  # (B, 3, size, size)
    dense: Tensor  # (B, N, G)
    summary: Tensor  # (B, things)
    glyphs: Tensor  # (B, N, thirds of a patch)
    layout: Tensor  # (B, N, LAYOUT_GROUPS)
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

    def __init__(self, curriculum: Curriculum = SMALL, pad_to: int | None = None) -> None:
        """`pad_to` is the number of tokens of every row; None pads a batch to its longest."""
        self.curriculum, self.pad_to = curriculum, pad_to
        self.tokenizer = tokenizer(curriculum.tokens)
        self.encoded: dict[str, list[int]] = {}  # texts that were met before
        images = IMAGE_TOKEN * curriculum.side**2
        self.prompt = self.encode("<|im_start|>user\n" + images + "\n")
        self.first_visual = self.prompt.index(curriculum.ids[IMAGE_TOKEN])

    def encode(self, text: str) -> list[int]:
        if text not in self.encoded:
            self.encoded[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.encoded[text]

    def question(self, question: scenes.Question) -> tuple[list[int], list[int]]:
        """Token ids of the question with the turn marks, and of the answer with its end."""
        turn = self.encode("<|im_end|>\n<|im_start|>assistant\n")
        return self.encode(question.text) + turn, self.encode(question.answer) + turn[:1]

    def pack(self, batch: list[Example]) -> Batch:
        rows = [self._row(questions) for _, _, questions in batch]
        L = max(self.pad_to or 0, *(len(ids) for ids, *_ in rows))
        B = len(rows)
        ids, positions, branch = np.zeros((B, L), int), np.zeros((B, L), int), np.full((B, L), -2)
        at, targets, of = [], [], []
        kinds: list[str] = []
        for b, ((row, place, branches, answers), (_, _, questions)) in enumerate(
            zip(rows, batch, strict=True)
        ):
            n = len(row)
            ids[b, :n], positions[b, :n], branch[b, :n] = row, place, branches
            for where, token, q in answers:
                at.append(b * L + where)
                targets.append(token)
                of.append(len(kinds) + q)
            kinds += [q.kind for q in questions]
        groups = list(self.curriculum.groups)
        pictures = [np.asarray(world.picture(drawn)) for world, drawn, _ in batch]
        pixels = np.stack(pictures).transpose(0, 3, 1, 2)
        dense = np.stack([world.patch_targets(drawn, groups) for world, drawn, _ in batch])
        summary = np.stack([world.summary(drawn) for world, drawn, _ in batch])
        glyphs = np.stack([world.glyphs(drawn) for world, drawn, _ in batch])
        layout = np.stack([world.layout_targets(drawn) for world, drawn, _ in batch])
        t = torch.from_numpy
        return Batch(
            t(pixels.copy()), t(dense), t(summary), t(glyphs), t(layout), t(ids), t(positions),
            t(branch), torch.tensor(at), torch.tensor(targets), torch.tensor(of), kinds,
            self.first_visual,
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


class ScenesBatches(IterableDataset):
    """Endless training batches; batch number i is the same in every run."""

    def __init__(
        self,
        batch: int,
        question_tokens: int,
        first: int = 0,
        curriculum: Curriculum = SMALL,
        is_padded: bool = False,
    ) -> None:
        """With `is_padded` all rows have the prompt's and `question_tokens` tokens."""
        self.batch, self.question_tokens, self.first = batch, question_tokens, first
        self.curriculum, self.is_padded = curriculum, is_padded

    def __iter__(self) -> Iterator[Batch]:
        packer, info = Packer(self.curriculum), get_worker_info()
        if self.is_padded:
            packer.pad_to = len(packer.prompt) + self.question_tokens
        number = self.first + (info.id if info else 0)
        while True:
            yield packer.pack([self._ask(packer, seed) for seed in self.seeds(number)])
            number += info.num_workers if info else 1

    def seeds(self, number: int) -> range:
        """The pictures of batch `number`, never held-out ones."""
        seeds = scenes.TRAIN_SEEDS[number * self.batch : (number + 1) * self.batch]
        assert len(seeds) == self.batch, "all training seeds are used up"
        return seeds

    def _ask(self, packer: Packer, seed: int) -> Example:
        world, rng = self.curriculum.world(seed), np.random.default_rng([seed, 3])
        drawn: Any = world.compose(seed)
        kinds, odds = list(world.mix), np.array(list(world.mix.values())) / sum(world.mix.values())
        questions, room = [], self.question_tokens
        for kind in rng.choice(kinds, TRIES, p=odds):
            question = world.ask(drawn, kind, rng)
            if question is None or question in questions:
                continue
            room -= sum(map(len, packer.question(question))) - 1
            if room < 0:
                break
            questions.append(question)
        return world, drawn, questions


def judge_batches(
    per_kind: int, batch: int, curriculum: Curriculum = SMALL, pad_to: int | None = None
) -> Iterator[Batch]:
    """The held-out questions of all worlds, packed."""
    packer, waiting = Packer(curriculum, pad_to), []
    for world in dict.fromkeys(curriculum.worlds):
        for drawn, questions in world.held_out(per_kind):
            waiting.append((world, drawn, questions))
            if len(waiting) == batch:
                yield packer.pack(waiting)
                waiting = []
    if waiting:
        yield packer.pack(waiting)
