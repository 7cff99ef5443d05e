"""Several turns with a model of ours: features and rows of earlier turns are not computed again.

Each image goes through the tower once. A turn chooses the image's tokens again, from all its
features, and the layers read the prompt's rows from the first that is not the same as before.

Shapes: H height, W width of a picture.
"""

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..checkpoints.errors import UserError
from ..inputs.budget import budget
from ..inputs.image import open_image
from ..inputs.messages import tokenize_conversation
from ..inputs.processor import Processor
from ..inputs.prompt import Prompt
from ..machine.clock import Clock, request_clock
from ..models.cache import LayerCache
from ..models.decoder import Decoder
from ..models.pruning import ImageBatch
from ..models.vlm import VLM, Prefill, SplicedImages
from ..pruners import Pipeline, Stage, StepBudgets
from .request import Request
from .result import GenerationResponse
from .steps import naming_faulty_part
from .stream import (
    PromptRead,
    check_prompt,
    check_request,
    faulty_part,
    pipeline_for,
    stream_answer,
)

# A row by what its keys and values depend on: its position, and a word's id or which image's
# token it is and how that came about.
RowKey = tuple[Any, ...]


@dataclass
class Picture:
    """An image of a conversation: what the tower sees of it, where that lies in its file, and the
    tower's last output.

    `encoding` names what else the output depends on, `digest` the pixels.
    """

    visible: Image.Image
    placement: dict[str, Any]
    pixels_1HW3: mx.array
    digest: bytes
    encoding: tuple[Any, ...] = ()
    batch: ImageBatch | None = None


@dataclass
class HeldPrompt:
    """The rows that the layers hold: those of a prompt, then of the answer's first tokens."""

    keys: list[RowKey]  # of the prompt
    next_position: int
    cache: list[LayerCache]
    token_ids: list[int] = field(default_factory=list)  # of the answer

    def common_rows(self, keys: Sequence[RowKey]) -> int:
        """How many rows of a prompt it begins with."""
        answer = enumerate(self.token_ids, self.next_position)
        held = [*self.keys, *answer][: min(layer.rows for layer in self.cache)]
        pairs = enumerate(zip(held, keys, strict=False))
        return next((n for n, (one, other) in pairs if one != other), min(len(held), len(keys)))


class Conversation:
    """What a model of ours keeps from turn to turn."""

    def __init__(self, model: VLM, processor: Processor) -> None:
        self.model, self.processor = model, processor
        self.clear()

    def clear(self) -> None:
        """Forget all images and rows."""
        self.pictures: list[Picture] = []
        self.sources: list[Any] = []  # what each of them was opened from
        self.held: HeldPrompt | None = None
        self.rows_reused = 0

    def check(self, request: Request) -> None:
        """Raises UserError for a method or a budget that the model cannot have."""
        check_request(self.processor, request)
        pipeline = pipeline_for(self.model, request.pruner)
        self.model.language.check(pipeline)
        budget(self.model.N, request.keep_ratio, request.keep_tokens, pipeline)

    def stream(self, request: Request) -> Generator[GenerationResponse, None, None]:
        """The answer to a request with the turns so far as its history. Raises UserError."""
        clock = request_clock()
        pictures, prompt = self.open(request, clock)
        with self.naming_faulty_part(pictures, prompt):
            read = self.read(request, pictures, prompt, clock)
            for piece in self.answer(request, read, clock):
                self.pictures, self.sources = pictures, [*request.images]
                yield piece

    def open(self, request: Request, clock: Clock) -> tuple[list[Picture], Prompt]:
        """All images so far and those that the request brings, and all turns. Raises UserError."""
        pictures = [
            self.known_picture(place, source, request.pixel_limit)
            for place, source in enumerate(request.images)
        ]
        prompt = self.tokenize(request)
        clock.end_part("image", [picture.pixels_1HW3 for picture in pictures])
        mx.reset_peak_memory()
        return pictures, prompt

    def naming_faulty_part(
        self, pictures: Sequence[Picture], prompt: Prompt
    ) -> AbstractContextManager[None]:
        """A block in which values that are not finite become a UserError that names their part."""
        pixels = [picture.pixels_1HW3.astype(self.model.dtype) for picture in pictures]
        pixels_IHW3 = mx.concatenate(pixels) if pixels else None  # computed where it is needed
        return naming_faulty_part(partial(faulty_part, self.model, [prompt], pixels_IHW3))

    def read(
        self, request: Request, pictures: Sequence[Picture], prompt: Prompt, clock: Clock
    ) -> PromptRead:
        """The prompt through the model, as far as it must be. Raises UserError."""
        model, pipeline = self.model, pipeline_for(self.model, request.pruner)
        K = budget(model.N, request.keep_ratio, request.keep_tokens, pipeline)
        budgets = pipeline.budgets(model.N, K)
        model.language.check(pipeline)
        with clock.running():
            batches = [self.encode(picture, pipeline, budgets) for picture in pictures]
            read = model.splice_encoded([prompt], batches, pipeline, budgets, request.positions)
            prefill = self.prefill(read, prompt, [picture.digest for picture in pictures])
        visible = [picture.visible for picture in pictures]
        places = [picture.placement for picture in pictures]
        return PromptRead(prompt.ids, visible, pipeline, prefill, self.rows_reused, places)

    def answer(
        self, request: Request, answered: PromptRead, clock: Clock
    ) -> Generator[GenerationResponse, None, None]:
        """The answer to a prompt that was read, whose tokens' rows the layers hold from then on."""
        try:
            for piece in stream_answer(self.model, self.processor, request, answered, clock):
                if self.held:
                    self.held.token_ids.append(piece.token)
                yield piece
        except GeneratorExit:  # the caller stops between two tokens
            raise
        except BaseException:  # some layers may have read a row that others have not
            self.held = None
            raise

    def known_picture(self, place: int, source: Any, max_pixels: int) -> Picture:
        """An image of a request: the picture that is held at its place, if that was opened from the
        same source; its tower's output, if only the pixels are the same. Raises UserError."""
        held = self.pictures[place] if place < len(self.pictures) else None
        if held and self.sources[place] is source:
            return held
        opened = self.open_picture(source, max_pixels)
        if held and held.digest == opened.digest:
            return replace(opened, encoding=held.encoding, batch=held.batch)
        return opened

    def open_picture(self, source: Any, max_pixels: int) -> Picture:
        """What the tower reads of an image. Raises UserError."""
        preprocess, opened = self.processor.image, open_image(source, max_pixels)
        visible = preprocess.visible(opened)
        pixels_1HW3 = mx.array(preprocess.values(visible)[None])  # computed: any thread may read it
        digest = sha256(visible.tobytes()).digest()
        return Picture(visible, preprocess.placement(opened), pixels_1HW3, digest)

    def tokenize(self, request: Request) -> Prompt:
        """All turns as ids. Raises UserError."""
        prompt = tokenize_conversation(
            self.processor.tokenizer, request.history, request.prompt,
            [self.model.N] * len(request.images), self.processor.image_token,
            request.chat_template_config, request.system,
        )  # fmt: skip
        try:
            check_prompt(self.model, prompt)
        except UserError as problem:
            advice = "; begin again" if request.history else ""
            raise UserError(f"{problem}{advice}") from None
        return prompt

    def encode(self, picture: Picture, pipeline: Pipeline, budgets: StepBudgets) -> ImageBatch:
        """The tower's output; it is run where what it depends on has changed."""
        encoding = self.encoding(pipeline, budgets)
        if picture.batch is None or picture.encoding != encoding:
            pixels_1HW3 = picture.pixels_1HW3.astype(self.model.dtype)
            picture.batch = self.model.encode(pixels_1HW3, pipeline, budgets)
            picture.encoding = encoding
        return picture.batch

    def encoding(self, pipeline: Pipeline, budgets: StepBudgets) -> tuple[Any, ...]:
        """What the tower's output depends on beside the pixels: the methods inside the tower with
        their budgets, and the layers of the signals."""
        inside = [
            (step.spec, left, budgets.gives_back(step))
            for step, left in budgets.at(Stage.IMAGE, Stage.ENCODER)
        ]
        tower = self.model.config.vision
        signals = pipeline.signal_layers(tower.depth, tower.layers_behind)
        return tuple(inside), tuple(sorted(signals.items()))

    def prefill(self, read: SplicedImages, prompt: Prompt, images: Sequence[bytes]) -> Prefill:
        """The prompt through the layers, from the first row that they do not hold; `images` are the
        digests of its images.

        Where rows leave between the layers, or a layer has a state and no rows, or what restores
        attention must weigh them all, all is read.
        """
        model, held, self.held, self.rows_reused = self.model, self.held, None, 0
        cuts = model.cuts(read.batches, read.pipeline, read.K, read.policy, None)
        cache = model.language.make_cache()
        has_rows = all(isinstance(layer, LayerCache) for layer in cache)
        if cuts.layers or read.pipeline.enhancer or not has_rows:
            return model.finish_prefill(read, *model.decode(read))
        keys = row_keys(read, prompt, images)
        if held := self.reusable(held, keys):
            self.rows_reused = min(held.common_rows(keys), len(keys) - 1)
            cache = held.cache
            for layer in cache:
                layer.rewind(self.rows_reused)
        decoded = Decoder(model.language, cache)(read.spliced.after(self.rows_reused))
        self.held = HeldPrompt(keys, int(np.array(read.spliced.next_B1)[0, 0]), cache)
        return model.finish_prefill(read, decoded, cache)

    def reusable(self, held: HeldPrompt | None, keys: Sequence[RowKey]) -> HeldPrompt | None:
        """Rows that a prompt may begin with, which change with it: those of the turn before."""
        return held


def row_keys(read: SplicedImages, prompt: Prompt, images: Sequence[bytes]) -> list[RowKey]:
    """What each row of a prompt depends on beside those before it."""
    keys: list[Any] = []
    cursor = 0
    for image, batch, (start, length) in zip(images, read.batches, prompt.runs, strict=True):
        keys += [*prompt.ids[cursor:start], *token_keys(image, batch, read)]
        cursor = start + length
    keys += prompt.ids[cursor:]
    positions = np.array(read.spliced.positions_BL)[0].tolist()
    return list(zip(positions, keys, strict=True))


def token_keys(image: bytes, batch: ImageBatch, read: SplicedImages) -> list[RowKey]:
    """The same of an image's K tokens, but for their positions.

    A token that was chosen depends on its index, a mixed one on all that were chosen with it. What
    a learned method mixes in by the words of the prompt is never the same.
    """
    kept, pipeline = batch.kept_of_encoded, read.pipeline
    choice: Any = None
    if kept.merges or kept.index_BK is None:
        choice = tuple(np.array(part.astype(mx.float32)).tobytes() for part in kept.arrays)
    if pipeline.needs_signal("text") and any(step.method.learned for step in pipeline.steps):
        choice = object()
    index = range(kept.slots) if kept.index_BK is None else np.array(kept.index_BK)[0].tolist()
    return [(image, pipeline.spec, read.K, choice, n) for n in index]
