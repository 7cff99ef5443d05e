"""Answers of a model of mlx-vlm's that are written together, by its `BatchGenerator`.

The language model leaves dropped rows out, as in a block of `pruned`; each prompt comes with its
own method and budget, so nothing is put on `get_input_embeddings`. A prompt is read alone, apart
from the answers, so that an error in it is its own. Then it joins them.

Shapes: V words.
"""

from collections.abc import Hashable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from ..generation.request import Request
from ..generation.result import GenerationResult
from ..generation.running_batch import AnswerPiece, AnswerRoom, PreparedRequest, answer_room
from ..generation.sampling import SeededSampler, penalties
from ..generation.steps import sample_token
from ..generation.stream import AnswerWriter, initial_result
from ..inputs.budget import LOW_DETAIL_PART, LOW_DETAIL_TOKENS, budget, check_budget
from ..machine.bounded_store import BoundedStore
from ..machine.clock import Clock, request_clock
from ..machine.hardware import versions
from ..pruners import Pipeline
from ..pruners.contract import Policy
from ..pruners.trace import Trace
from .clips import check_clip, open_clip
from .compatibility import check_pipeline
from .families import host_of
from .families.pruner_defaults import plan_for_host
from .host import generation_stream
from .input_embeddings import PrunedEmbeddings
from .prepared_inputs import PreparedInputs, ProcessorOptions
from .pruned_language import LanguageState, pruned_class
from .stream import open_images, prepare_request
from .tower_cache import TowerCache
from .views import View

# Of mlx-vlm's BatchGenerator, beside its interface; there in the version that was tried.
PRIVATE = ("_generation_batch", "_prompt_batch", "_extend_generation_batch")
TRIED_VERSION = "0.7.10"


@dataclass(frozen=True)
class PreparedPictures(PreparedRequest):
    """A request to a model of mlx-vlm's, as its processor hands it over."""

    inputs: PreparedInputs


@dataclass
class HostAnswer:
    """An answer of mlx-vlm's that is being written; the writer is made with its first token.

    Of its prompt the figures are held, and neither pixels nor features.
    """

    key: Hashable
    clock: Clock
    room: AnswerRoom
    trace: Trace
    pipeline: Pipeline
    policy: Policy
    writer: AnswerWriter | None = None


class HostRunningBatch:
    """Answers of a model of mlx-vlm's, `most_answers` at once; `most_bytes` is what is held of the
    tower's output for earlier images. While it exists, the model prunes nowhere else."""

    def __init__(self, model: Any, processor: Any, most_answers: int, most_bytes: int = 0) -> None:
        self.host = host_of(model, processor)
        self.most_answers, self.why_no_clips = most_answers, self.host.why_no_clips
        self.context = self.host.context
        tokenizer = getattr(processor, "tokenizer", processor)
        self.longest_token = max(map(len, tokenizer.get_vocab()))
        self.towers = TowerCache(self.host, BoundedStore[list[View]](most_bytes))
        can_enhance = self.host.why_no_enhancer is None
        layers = self.host.mask_layers if can_enhance else ()
        self.state = LanguageState(self.host.is_bidirectional, layers)
        language, base = model.language_model, type(model.language_model)
        with ExitStack() as undo:
            undo.enter_context(self.host.preserve_state())
            undo.callback(self.state.invalidate_caches)
            language.__class__ = pruned_class(base, self.state)
            undo.callback(setattr, language, "__class__", base)
            self.generator: Any = None
            self.clear()
            self._undo = undo.pop_all()

    def __len__(self) -> int:
        return len(self.answers)

    def clear(self) -> None:
        """Forget all answers, after an error."""
        from mlx_vlm.generate import BatchGenerator

        if self.generator is not None:
            self.generator.close()
        self.answers: dict[int, HostAnswer] = {}
        self.generator = BatchGenerator(
            self.host.language,
            self.host.processor,
            prefill_batch_size=1,  # each prompt is read as it is alone
            completion_batch_size=self.most_answers,
        )
        check_generator(self.generator)
        self._no_answers = self.generator._generation_batch

    def close(self) -> None:
        """Leave the model as it was."""
        self.generator.close()
        self.towers.store.clear()
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
        if request.video is not None:
            check_clip(self.host, pipeline)
        policy = check_pipeline(self.host, pipeline, request.positions)
        if pipeline.decoder:
            raise UserError(
                f"{pipeline.decoder.name} works between the language model's layers, where batches"
                " of mlx-vlm's do not reach; choose another method"
            )
        return pipeline, policy

    def prepare(self, request: Request) -> PreparedPictures:
        """Pictures or a clip and all turns through mlx-vlm's template and processor. Raises
        UserError."""
        clock = request_clock()
        options = ProcessorOptions()
        seen = open_clip(request, options) or open_images(request)
        inputs = prepare_request(self.host, request, seen, options)
        # What is not computed belongs to this thread, and another one reads the prompt.
        clock.end_part("image", [inputs.mask_1L, inputs.pixels, [*inputs.extra.values()]])
        return PreparedPictures(request, clock, len(inputs.ids), inputs)

    def rows_left(self, prepared: PreparedPictures, *, low_detail: bool = False) -> int:
        """The rows of a pruned prompt at most, where each of them has its id; how many tokens each
        image becomes is known only after the tower. Raises UserError."""
        host, request, ids = self.host, prepared.request, prepared.inputs.ids
        pipeline, _ = self._plan(request)
        has_own_number = pipeline.trained_tokens or pipeline.own_budget(len(ids)) is not None
        has_own_number = has_own_number or pipeline.has_dynamic_budget
        images = len(request.images) or int(request.video is not None)
        if host.placeholder_unit != "token" or has_own_number or not images:
            return prepared.rows
        N = ids.count(host.image_token_id(prepared.inputs))
        if low_detail:
            K = images * LOW_DETAIL_TOKENS + N // LOW_DETAIL_PART
        elif request.keep_tokens is not None:
            K = images * request.keep_tokens
        else:
            K = budget(N, request.keep_ratio, None, pipeline) + images  # each keeps one at least
        return prepared.rows - N + min(N, K)

    def add(
        self, key: Hashable, prepared: PreparedPictures, *, low_detail: bool = False
    ) -> AnswerRoom:
        """Read a prompt. Raises UserError."""
        host, request, inputs = self.host, prepared.request, prepared.inputs
        prepared.clock.resume()
        pipeline, policy = self._plan(request)
        embeddings = PrunedEmbeddings(
            host, pipeline, request.keep_ratio, request.keep_tokens, policy, False, self.state,
            low_detail,
        )  # fmt: skip
        embeddings.towers = self.towers
        with generation_stream(), prepared.clock.running():
            features, prompt = embeddings.of_prompt(inputs)
            rows = prompt.length if prompt else len(inputs.ids)
            host.check_length(rows)
        room = answer_room(request, rows, self.context)
        more = {name: value for name, value in features.to_dict().items() if value is not None}
        (uid,) = self.generator.insert(
            [inputs.ids],
            max_tokens=[room.max_tokens + 1],  # the writer ends answers, see `step`
            prompt_kwargs=[{**inputs.extra, **more}],
            logits_processors=[row_processors(request)],
        )
        self._read(uid)
        trace = prompt.trace if prompt else Trace([], [], [])
        policy = prompt.positions if prompt else policy
        self.answers[uid] = HostAnswer(key, prepared.clock, room, trace, pipeline, policy)
        return room

    def _read(self, uid: int) -> None:
        """The prompt that waits, up to its first token; the answers are put aside until then."""
        generator, running = self.generator, self.generator._generation_batch
        generator._generation_batch = self._no_answers
        try:
            while generator.has_pending_prompts:
                generator.next()
            read = generator._generation_batch
        except BaseException:
            generator._prompt_batch = None
            generator.remove(uid)
            raise
        finally:
            generator._generation_batch = running
        read.stop_criteria = lambda token: False  # the writer ends answers, see `step`
        generator._extend_generation_batch(read)

    def step(self) -> Iterator[AnswerPiece]:
        """A token of each answer.

        mlx-vlm has begun the next step by then, and waits for it before an answer can leave. So
        those that have ended leave behind the last piece, when whoever waits for them has it.
        """
        _, responses = self.generator.next()
        for response in responses:
            answer = self.answers[response.uid]
            piece = self._written(answer, response)
            if isinstance(piece.response, Exception) or piece.response.finish_reason:
                del self.answers[response.uid]
            yield piece
        self._leave_out_ended()

    def _leave_out_ended(self) -> None:
        """Of mlx-vlm's batch keep the rows of those answers that are still known."""
        batch = self.generator._generation_batch
        keep = [row for row, uid in enumerate(batch.uids) if uid in self.answers]
        if len(keep) < len(batch.uids):
            with generation_stream():
                batch.filter(keep)
        if not self.answers:
            mx.clear_cache()

    def _written(self, answer: HostAnswer, response: Any) -> AnswerPiece:
        """The piece of a token, or the fault that ends the answer; the other answers go on."""
        try:
            if answer.writer is None:
                answer.clock.end_part("prefill")
                answer.writer = self._writer(answer)
            if np.isnan(response.token_logprob):
                raise UserError("the model gave NaN or infinite values; try dtype='float32'")
            piece = answer.writer.add(response.token)
        except Exception as fault:
            return AnswerPiece(answer.key, fault)
        return AnswerPiece(answer.key, piece, answer.writer.answer)

    def remove(self, key: Hashable) -> None:
        """Write no more of an answer, if it is known."""
        for uid in [uid for uid, answer in self.answers.items() if answer.key == key]:
            del self.answers[uid]
            self._leave_out_ended()

    def _writer(self, answer: HostAnswer) -> AnswerWriter:
        """What turns the answer's tokens into text, with the figures of its prompt."""
        criteria = getattr(self.host.processor, "tokenizer", self.host.processor).stopping_criteria
        return AnswerWriter(
            HostText(self.host.processor),
            frozenset(criteria.eos_token_ids),
            self._figures(answer),
            answer.room.max_tokens,
        )

    def _figures(self, answer: HostAnswer) -> GenerationResult:
        depth = len(self.host.language.layers)
        result = initial_result(answer.trace, depth, answer.pipeline, answer.policy)
        return result.prefilled(answer.room.rows, answer.clock.ttft())


def check_generator(generator: Any) -> None:
    """Raises UserError where mlx-vlm's batches are not those that prompts can be put aside of."""
    missing = [name for name in PRIVATE if not hasattr(generator, name)]
    if missing:
        generator.close()
        raise UserError(
            f"mlx-vlm {versions()['mlx-vlm']} has no BatchGenerator.{missing[0]}, by which prompts"
            f" are read apart; install mlx-vlm {TRIED_VERSION}"
        )


def row_processors(request: Request) -> list[Any] | None:
    """What changes the logits of one answer in a batch: penalties, then `DrawnToken`."""
    from mlx_vlm import sample_utils

    processors: list[Any] = penalties(sample_utils, request) if request.repetition_penalty else []
    if request.temperature:
        processors.append(DrawnToken(SeededSampler(sample_utils.make_sampler, request)))
    return processors or None


class DrawnToken:
    """A logits processor that draws a token and leaves a chance to it alone.

    mlx-vlm's batch has one sampler for all answers, which takes the likeliest token. So answers
    with temperatures of their own draw before it.
    """

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
