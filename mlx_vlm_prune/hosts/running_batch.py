"""Answers of a model of mlx-vlm's that are written together, by its `BatchGenerator`.

The language model leaves dropped rows out, as in a block of `pruned`; each prompt comes with its
own method and budget, so nothing is put on `get_input_embeddings`. A prompt is read alone and then
joins the batch.

Shapes: V words.
"""

from collections.abc import Hashable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from ..generation.request import Request
from ..generation.result import GenerationResult
from ..generation.running_batch import AnswerPiece
from ..generation.sampling import SeededSampler, penalties
from ..generation.steps import sample_token
from ..generation.stream import AnswerWriter, initial_result
from ..inputs.budget import budget, check_budget, low_detail_tokens
from ..inputs.image import open_image
from ..machine.bounded_store import BoundedStore
from ..machine.clock import Clock, request_clock
from ..pruners import Pipeline
from ..pruners.contract import Policy
from ..pruners.trace import Trace
from .compatibility import check_pipeline
from .families import host_of
from .families.pruner_defaults import plan_for_host
from .host import generation_stream
from .input_embeddings import PrunedEmbeddings
from .prepared_inputs import PreparedInputs, ProcessorOptions
from .prompt import PrunedPrompt, prepare_prompt, share_budget
from .pruned_language import LanguageState, pruned_class
from .tower_cache import BoundedTowerCache
from .views import View


@dataclass
class ServedEmbeddings(PrunedEmbeddings):
    """The embeddings of one prompt; with `low_detail` each image keeps `low_detail_tokens`."""

    low_detail: bool = False

    def budgets(self, views: list[View]) -> list[int]:
        """Each view's K."""
        if not self.low_detail:
            return super().budgets(views)
        budgets: list[int] = []
        for image in range(1 + max(view.image for view in views)):
            sizes = [view.signals.x_BND.shape[1] for view in views if view.image == image]
            K = budget(sum(sizes), None, low_detail_tokens(sum(sizes)), self.pipeline)
            budgets += share_budget(max(K, len(sizes)), sizes)
        return budgets


@dataclass
class Answer:
    """An answer that is being written; the writer is made with its first token."""

    key: Hashable
    request: Request
    inputs: PreparedInputs
    prompt: PrunedPrompt | None  # None without images
    pipeline: Pipeline
    policy: Policy
    clock: Clock
    writer: AnswerWriter | None = None


class HostRunningBatch:
    """Answers of a model of mlx-vlm's, `most_answers` at once; `most_bytes` is what is held of the
    tower's output for earlier images. While it exists, the model prunes nowhere else."""

    def __init__(self, model: Any, processor: Any, most_answers: int, most_bytes: int = 0) -> None:
        self.host = host_of(model, processor)
        self.most_answers = most_answers
        self.towers = BoundedTowerCache(self.host, BoundedStore[list[View]](most_bytes))
        can_enhance = self.host.why_no_enhancer is None
        layers = self.host.mask_layers if can_enhance else ()
        self.state = LanguageState(self.host.is_bidirectional, layers)
        language, base = model.language_model, type(model.language_model)
        self._undo = ExitStack()
        self._undo.enter_context(self.host.preserve_state())
        self._undo.callback(self.state.invalidate_caches)
        language.__class__ = pruned_class(base, self.state)
        self._undo.callback(setattr, language, "__class__", base)
        self.generator: Any = None
        self.clear()

    def __len__(self) -> int:
        return len(self.answers)

    def clear(self) -> None:
        """Forget all answers, after an error."""
        from mlx_vlm.generate import BatchGenerator

        if self.generator is not None:
            self.generator.close()
        self.answers: dict[int, Answer] = {}
        self.generator = BatchGenerator(
            self.host.language,
            self.host.processor,
            prefill_batch_size=1,  # each prompt is read as it is alone
            completion_batch_size=self.most_answers,
        )

    def close(self) -> None:
        """Leave the model as it was."""
        self.generator.close()
        self._undo.close()

    def check(self, request: Request) -> None:
        """Raises UserError for a method or a budget that the model cannot have in a batch."""
        self._plan(request)
        check_budget(request.keep_ratio, request.keep_tokens)

    def _plan(self, request: Request) -> tuple[Pipeline, Policy]:
        """A request's methods, and the policy of positions that holds. Raises UserError."""
        for name in ("eos_tokens", "sampler", "logits_processors", "host_options"):
            if getattr(request, name):  # mlx-vlm's batches have them for all prompts or not at all
                raise UserError(f"{name} is not possible in a batch of mlx-vlm's; leave it out")
        pipeline = plan_for_host(self.host, request.pruner)
        policy = check_pipeline(self.host, pipeline, request.positions)
        if pipeline.decoder:
            raise UserError(
                f"{pipeline.decoder.name} works between the language model's layers, where batches"
                " of mlx-vlm's do not reach; choose another method"
            )
        return pipeline, policy

    def add(self, key: Hashable, request: Request, *, low_detail: bool = False) -> None:
        """Make a prompt ready, which the next step reads. Raises UserError."""
        host, clock = self.host, request_clock()
        pipeline, policy = self._plan(request)
        images = [open_image(source, request.pixel_limit) for source in request.images]
        inputs = prepare_prompt(
            host, request.prompt, images, request.chat_template_config, ProcessorOptions(),
            request.history, request.system,
        )  # fmt: skip
        clock.end_part("image", inputs.pixels)
        embeddings = ServedEmbeddings(
            host, pipeline, request.keep_ratio, request.keep_tokens, policy, False, self.state,
            low_detail,
        )  # fmt: skip
        embeddings.tower_cache = self.towers.of(pipeline)
        with generation_stream(), clock.running():
            features, prompt = embeddings.of_prompt(inputs)
            host.check_length(prompt.length if prompt else len(inputs.ids))
        more = {name: value for name, value in features.to_dict().items() if value is not None}
        (uid,) = self.generator.insert(
            [inputs.ids],
            max_tokens=[request.max_tokens],
            prompt_kwargs=[{**inputs.extra, **more}],
            logits_processors=[row_processors(request)],
        )
        self.answers[uid] = Answer(key, request, inputs, prompt, pipeline, policy, clock)

    def step(self) -> list[AnswerPiece]:
        """A token of each answer that was read, and one prompt more is read."""
        _, responses = self.generator.next()
        pieces = []
        for response in responses:
            answer = self.answers[response.uid]
            if answer.writer is None:
                answer.clock.end_part("prefill")
                answer.writer = self._writer(answer)
            if np.isnan(response.token_logprob):
                fault = UserError("the model gave NaN or infinite values; try dtype='float32'")
                self.remove(answer.key)
                pieces.append(AnswerPiece(answer.key, fault))
                continue
            piece = answer.writer.add(response.token)
            pieces.append(AnswerPiece(answer.key, piece, answer.writer.answer))
            if piece.finish_reason:
                del self.answers[response.uid]
        return pieces

    def remove(self, key: Hashable) -> None:
        """Write no more of an answer, if it is known."""
        for uid in [uid for uid, answer in self.answers.items() if answer.key == key]:
            self.generator.remove(uid)
            del self.answers[uid]

    def _writer(self, answer: Answer) -> AnswerWriter:
        """What turns the answer's tokens into text, with the figures of its prompt."""
        criteria = getattr(self.host.processor, "tokenizer", self.host.processor).stopping_criteria
        return AnswerWriter(
            HostText(self.host.processor),
            frozenset(criteria.eos_token_ids),
            self._figures(answer),
            answer.request.max_tokens,
        )

    def _figures(self, answer: Answer) -> GenerationResult:
        prompt, depth = answer.prompt, len(self.host.language.layers)
        if prompt is None:
            trace, policy, length = Trace([], [], []), answer.policy, len(answer.inputs.ids)
        else:
            trace, policy, length = prompt.trace, prompt.positions, prompt.length
        result = initial_result(trace, depth, answer.pipeline, policy)
        return result.prefilled(length, answer.clock.ttft())


def row_processors(request: Request) -> list[Any] | None:
    """What changes the logits of one answer in a batch: penalties, then the choice of a token at
    random, which the batch's greedy sampler then takes."""
    from mlx_vlm import sample_utils

    processors: list[Any] = penalties(sample_utils, request) if request.repetition_penalty else []
    if request.temperature:
        processors.append(RowSampler(SeededSampler(sample_utils.make_sampler, request)))
    return processors or None


class RowSampler:
    """A logits processor that leaves the sampled token alone."""

    def __init__(self, sampler: SeededSampler) -> None:
        self.sampler = sampler

    def __call__(self, tokens_L: mx.array, logits_1V: mx.array) -> mx.array:
        """Logits (1, V): 0 of the token, else -inf."""
        logprobs_1V = logits_1V - mx.logsumexp(logits_1V, axis=-1, keepdims=True)
        token_1 = sample_token(self.sampler, logprobs_1V)
        is_token_1V = mx.arange(logits_1V.shape[-1])[None] == token_1[:, None]
        return mx.where(is_token_1V, logits_1V * 0, -mx.inf)


class HostText:
    """Token ids as text by mlx-vlm's own detokenizer."""

    def __init__(self, processor: Any) -> None:
        from mlx_vlm.tokenizer_utils import make_streaming_detokenizer

        self.detokenizer = make_streaming_detokenizer(processor)

    def add(self, token: int) -> str:
        """The text that is now safe to print."""
        self.detokenizer.add_token(token)
        return str(self.detokenizer.last_segment)

    def finish(self) -> str:
        """What was held back."""
        self.detokenizer.finalize()
        return str(self.detokenizer.last_segment)
