"""`Host`: a model of mlx-vlm's with what pruning needs of it; each family is a subclass.

Shapes: K visual tokens kept of a view, L rows of the prompt, D features.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import mlx.core as mx
import numpy as np
from PIL import Image

from ..checkpoints.errors import UserError
from ..inputs.prompt import IMAGE_MARK
from ..inputs.template import check_template
from ..models.learned import read_learned
from ..pruners.contract import Reduction
from .language_layers import LanguageLayers, masked_logits
from .pictured_views import PicturedViews
from .prepared_inputs import PreparedInputs, ProcessorOptions
from .tower_cuts import TowerCuts
from .views import View

TRIAL = "tokenizer_trial"  # attribute of a model, see checkpoints/tokenizer_trial.py
ADAPTERS = "adapters_key"  # attribute of a model: a fingerprint of those that it was loaded with
LONGEST = 1 << 20  # rows, where a config does not say how many the model reads
REQUEST_STATE = ("_position_ids", "_rope_deltas")  # mlx-vlm keeps these on the language model


class Host(PicturedViews, ABC):
    """A loaded model with its processor; `host_of` makes it.

    A family must define `depth` and `encode_images`. The rest suits most families.
    """

    has_mrope: ClassVar[bool] = False  # positions have three axes, and are arguments
    # What one placeholder stands for: a visual token, an image, or all images of the prompt.
    placeholder_unit: ClassVar[Literal["token", "image", "all"]] = "token"
    # Why no token can leave between the tower's layers, if so; a family that lets them has
    # `encode_with_cuts`.
    why_no_encoder_methods: ClassVar[str | None] = (
        "it works between the tower's layers, which are not driven from here in this family"
    )
    why_no_enhancer: ClassVar[str | None] = None  # why no row can get more attention, if so
    why_no_probe: ClassVar[str | None] = None  # why no projector can be asked on its own, if so
    # Why no row can leave between the language model's layers, where they are not driven from here.
    why_no_decoder_methods: ClassVar[str] = "the language model's layers are not driven from here"
    why_no_batches: ClassVar[str | None] = None  # why prompts are read one at a time, if so
    why_not_counted: ClassVar[str | None] = None  # why operations are not counted, if so
    why_no_clips: ClassVar[str | None] = (  # why it answers about no clip, if so
        "videos were tried in Qwen's families alone; give frames as images"
    )
    parts_frames: ClassVar[bool] = False  # do words stand between a clip's frames?
    # Why no method's weights learn in it, if so; where they do, it says `feature_dims`.
    why_not_learned: ClassVar[str | None] = (
        "training was not tried in this family, which does not say how wide its features are"
    )
    limits: ClassVar[str | None] = None  # what works only in part, for docs/hosts.md
    per_row_inputs: ClassVar[Sequence[str]] = ()  # arrays of the processor's with an entry a row
    has_image_rows: ClassVar[bool] = False  # are rows of tiled pixels images, in place of prompts?
    projects_views_apart: ClassVar[bool] = False  # as mlx-vlm does, so that bits are the same
    # Drives the language model's layers one by one, for decoder methods.
    language_layers_class: ClassVar[type[LanguageLayers] | None] = None
    why_no_feature_gradient: ClassVar[str | None] = None  # of the loss by visual tokens, if so
    has_tiles: ClassVar[bool] = False  # may an image be cut into several views?

    def __init__(self, model: Any, processor: Any = None):
        self.model, self.processor = model, processor

    @property
    @abstractmethod
    def depth(self) -> int:
        """The number of tower layers that signals can be taken from."""

    @property
    def layers_behind(self) -> int:
        """The number of tower layers behind those; signals can be taken from the first, too."""
        return 0

    @abstractmethod
    def encode_images(self, inputs: PreparedInputs, want: Mapping[str, int | None]) -> list[View]:
        """Run the tower: a view of each picture, with the signals in `want`, each from the layer
        given there.

        Raises UserError for images that this family cannot read.
        """

    def encode_with_cuts(
        self, inputs: PreparedInputs, want: Mapping[str, int | None], cuts: TowerCuts
    ) -> list[View]:
        """The same where tokens leave inside the tower; as `encode_images` where none do."""
        raise NotImplementedError

    @property
    def feature_dims(self) -> int | None:
        """D of the tower's output, where learned methods work; else None."""
        return None

    @property
    def learned(self) -> Mapping[str, Any]:
        """The weights of learned methods that lie in the model's folder, by name.

        They are read once a model. Raises UserError for a file that does not fit.
        """
        model, folder = self.model, getattr(self.model, "model_path", None)
        known: Mapping[str, Any] | None = getattr(model, "learned_pruners", None)
        if known is not None:
            return known
        learned = read_learned(Path(folder), self) if folder and self.feature_dims else {}
        if learned:
            model.learned_pruners = MappingProxyType(learned)  # so they are no parameters of its
        return learned

    def masked_logits(
        self, ids_1L: mx.array, x_1LD: mx.array, mask_11LL: mx.array, position_ids: mx.array | None
    ) -> mx.array:
        """Of every row (1, L, V), without a cache; the mask is added to all rows' attention."""
        positions = {"position_ids": position_ids} if self.has_mrope else {}
        return masked_logits(self.language, ids_1L, x_1LD, mask_11LL, **positions)

    def project(self, x_1KD: mx.array) -> mx.array:
        """The projector: embeddings of visual tokens (1, K, D)."""
        return self.model.multi_modal_projector(x_1KD)

    def prepare(
        self, text: str, images: Sequence[Image.Image], options: ProcessorOptions
    ) -> PreparedInputs:
        """Ids and pixels, as mlx-vlm itself makes them; `text` is what the chat template gave."""
        from mlx_vlm.utils import prepare_inputs, should_add_special_tokens

        arrays = prepare_inputs(
            self.processor,
            images=list(images) or None,
            prompts=text,
            image_token_index=getattr(self.model.config, "image_token_index", None),
            resize_shape=options.resize,
            add_special_tokens=should_add_special_tokens(self.kind, self.processor),
            **options.kwargs,
        )
        names = ("input_ids", "attention_mask", "pixel_values")
        ids, mask, pixels = (arrays.pop(name, None) for name in names)
        ids = mx.array(ids).reshape(-1)
        mask = mx.ones((1, len(ids)), mx.int32) if mask is None else mask
        return PreparedInputs(np.array(ids).tolist(), mask, pixels, len(images), arrays)

    @property
    def word_table(self) -> Any:
        """The module that holds an embedding of each word."""
        return self.language.model.embed_tokens

    def embed(self, ids: mx.array) -> mx.array:
        """The word embeddings of ids."""
        return self.word_table(ids)

    def stock_embeddings(self, ids: mx.array | None, pixels: Any, **arguments: Any) -> Any:
        """mlx-vlm's own features of prompts, also in a model that prunes."""
        model = self.model
        return model.__class__.get_input_embeddings(model, ids, pixels, **arguments)

    def join_embeddings(self, x: Sequence[mx.array], is_full: bool) -> mx.array | list[mx.array]:
        """The embeddings (K, D) of each view as mlx-vlm's `cached_image_features`; here as those of
        one picture. `is_full`: does every token stay?"""
        return mx.concatenate(list(x))[None]

    def image_embeddings(
        self, views: Sequence[View], x: Sequence[mx.array], is_full: bool
    ) -> mx.array | list[mx.array]:
        """As `join_embeddings`, for families that need to know of which image each view is."""
        return self.join_embeddings(x, is_full)

    def placeholders_of_blocks(
        self, placeholders: np.ndarray, views: Sequence[View], reductions: Sequence[Reduction]
    ) -> np.ndarray:
        """Which placeholders stay where each stands for a block of rows."""
        raise NotImplementedError

    def arrange_ids(self, ids_1L: mx.array) -> mx.array:
        """A prompt's ids as mlx-vlm must get them to put images among words where they stand."""
        return ids_1L

    def full_rows(self, tokens: int, images: int) -> int:
        """The rows that images of so many visual tokens take where nothing is pruned."""
        return tokens

    def image_token_id(self, inputs: PreparedInputs) -> int:
        """The placeholder's id. Configs call it index or id; a processor's comes before them."""
        names = {**vars(self.model.config), **inputs.extra}
        return names["image_token_index" if "image_token_index" in names else "image_token_id"]

    def assign_tiles(self, inputs: PreparedInputs, views: list[View]) -> list[View]:
        """The views with their images, for a prompt that comes without the number of tiles.

        Raises UserError where prompt and tiles do not fit.
        """
        return views

    def knows_images(self, inputs: PreparedInputs, views: Sequence[View]) -> bool:
        """Is it known which views are of the same image?"""
        return True

    @property
    def kind(self) -> str:
        """The model_type."""
        return self.model.config.model_type

    @property
    def tower(self) -> Any:
        """The vision encoder."""
        return self.model.vision_tower.vision_model

    @property
    def deepstack(self) -> Mapping[int, Callable[[mx.array], mx.array]]:
        """DeepStack's projectors, by the tower layer whose output they read."""
        return {}

    @property
    def language(self) -> Any:
        return self.model.language_model

    @property
    def language_layers(self) -> LanguageLayers | None:
        """The language model's layers one by one; None where they cannot be driven from here."""
        layers = self.language_layers_class
        return None if layers is None else layers(self.language)

    @property
    def mask_layers(self) -> Sequence[int]:
        """The layers whose caches mlx-vlm asks for masks."""
        return (0,)

    @property
    def is_bidirectional(self) -> bool:
        """Do a prompt's rows attend to later ones, so that it is read in one call?"""
        policy = getattr(self.model, "chunked_prefill_policy", None)
        return callable(policy) and not policy()

    @property
    def image_marks(self) -> list[str]:
        """Texts that stand for an image in a prompt: our mark, and the model's own."""
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        ids = (getattr(self.model.config, f"image_token_{end}", None) for end in ("index", "id"))
        # FastVLM's is -200: no token at all
        tokens = [tokenizer.convert_ids_to_tokens(i) for i in ids if i is not None and i >= 0]
        marks = [IMAGE_MARK, getattr(self.processor, "image_token", None), *tokens]
        return list(dict.fromkeys(mark for mark in marks if isinstance(mark, str) and mark))

    def template_config(self, images: int) -> tuple[Any, int]:
        """What mlx-vlm's chat template is to know of the model, and how many images."""
        return self.model.config, images

    def check_template(self, turns: Any, options: Mapping[str, Any]) -> None:
        """UserError where the chat template would take too much time or memory for these turns;
        transformers renders it without a bound."""
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        values = {**getattr(tokenizer, "special_tokens_map", {}), **options}
        values |= {"messages": turns, "add_generation_prompt": True}
        chosen = options.get("chat_template")  # a text, or the name of one of several
        for holder in (self.processor, tokenizer):
            text = getattr(holder, "chat_template", None)
            if isinstance(text, Mapping):
                text = text.get(chosen or "default", chosen)
            else:
                text = chosen or text
            if isinstance(text, str):
                check_template(text, values, f"this {self.kind} model")

    def try_text(self, text: str) -> None:
        """UserError where the tokenizer would take too much time or memory for a text; tokenizers
        that are surely quick are not tried."""
        if trial := getattr(self.model, TRIAL, None):
            trial.check(text)

    def check_ids(self, inputs: PreparedInputs) -> None:
        """Raises UserError for a token that the model has no embedding of, but for placeholders."""
        words = len(self.word_table.weight)
        beyond = {number for number in inputs.ids if not 0 <= number < words}
        if beyond and (beyond := beyond - {self.image_token_id(inputs)}):
            raise UserError(
                f"the prompt has token {max(beyond)}; the model's vocabulary has {words}"
            )

    @property
    def context(self) -> int:
        """The most rows that the model reads."""
        return getattr(self.model.config.text_config, "max_position_embeddings", 0) or LONGEST

    def check_length(self, rows: int) -> None:
        """Raises UserError for a prompt of more rows than the model reads."""
        if rows > self.context:
            raise UserError(f"the prompt has {rows} tokens; the model reads up to {self.context}")

    @contextmanager
    def preserve_state(self) -> Iterator[None]:
        """Restore at the end what requests leave on the language model."""
        before = self.request_state()
        try:
            yield
        finally:
            self.set_request_state(before)

    def request_state(self) -> dict[str, Any]:
        """What the latest request left on the language model."""
        language = self.language
        return {name: getattr(language, name) for name in REQUEST_STATE if hasattr(language, name)}

    def set_request_state(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self.language, name, value)


def generation_stream() -> Any:
    """A context on mlx-vlm's own stream of computation: changing streams costs time."""
    from mlx_vlm.generate import generation_stream as stream

    return mx.stream(stream)
