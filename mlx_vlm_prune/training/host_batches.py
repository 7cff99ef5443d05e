"""Examples for a model of mlx-vlm's: by its chat template and its own processor."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from ..hosts.host import Host
from ..hosts.prepared_inputs import PreparedInputs
from ..hosts.prompt import prepare_prompt
from ..inputs.prompt import IMAGE_MARK, Prompt
from .batches import Batch, Reader, open_picture
from .examples import Example, TokenizedExample, count_marks, cut_to


@dataclass(frozen=True)
class HostBatch(Batch):
    """Examples that are read one after another; of each its inputs, with the answer."""

    inputs: Sequence[PreparedInputs] = ()


@dataclass
class HostReader(Reader):
    """Of questions with one answer: mlx-vlm's templates put images ahead of the text."""

    host: Host = field(kw_only=True)

    @property
    def longest(self) -> int | None:
        return getattr(self.host.model.config.text_config, "max_position_embeddings", None)

    def check_tokenizer(self) -> None:
        """Each example's ids are checked: mlx-vlm's tokenizers are of many kinds."""

    def batch(self, indices: np.ndarray, ahead: Iterable[np.ndarray] = ()) -> Batch | None:
        """Nothing is read ahead: mlx-vlm's processors make MLX arrays, in this thread."""
        return super().batch(indices)

    def read_example(self, example: Example) -> tuple[TokenizedExample, Sequence[Any]]:
        if len(example.turns) != 1 or example.system:
            raise UserError("a model of mlx-vlm's learns from one question and one answer here")
        count_marks(example)
        question, answer = example.turns[0]
        for _ in example.images:
            question = question.strip().removeprefix(IMAGE_MARK).removesuffix(IMAGE_MARK)
        images = [open_picture(picture) for picture in example.images]
        inputs = prepare_prompt(self.host, question.strip(), images, self.chat_template_config)
        tokenizer = getattr(self.host.processor, "tokenizer", self.host.processor)
        answer_ids = list(tokenizer.encode(answer, add_special_tokens=False))
        if images and self.host.image_token_id(inputs) in answer_ids:
            raise UserError("its answer holds the token of an image's place")
        end = getattr(tokenizer, "eos_token_id", None)
        ids = [*inputs.ids, *answer_ids, *([] if end is None else [end])]
        size = getattr(self.host.model.config.text_config, "vocab_size", None)
        if size and max(ids) >= size:
            raise UserError(f"it has the id {max(ids)}; the model's vocabulary has {size} entries")
        is_answer = np.arange(len(ids)) >= len(inputs.ids)
        read = cut_to(Prompt(ids, []), is_answer, self.max_seq_length)
        length = len(read.prompt.ids)
        added = mx.ones((1, length - len(inputs.ids)), mx.int32)
        mask_1L = mx.concatenate([inputs.mask_1L, added], axis=1)
        return read, [replace(inputs, ids=read.prompt.ids, mask_1L=mask_1L)]

    def join(
        self, examples: Sequence[TokenizedExample], pictures: Sequence[Any], numbers: Sequence[int]
    ) -> Batch:
        batch = Batch.of(examples, (), numbers)
        return HostBatch(batch.prompts, batch.is_answer, None, batch.indices, pictures)
