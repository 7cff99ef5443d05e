"""What turns a prompt and images into what a model reads; of either framework."""

from dataclasses import dataclass, replace
from pathlib import Path

import tokenizers

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.config import CLIPConfig, SiglipConfig, VLMConfig
from ..checkpoints.errors import UserError
from ..checkpoints.families import is_llava
from ..checkpoints.hub import DRAWN_MODELS
from ..checkpoints.llava.original import pads_to_square
from ..checkpoints.processor import PREPROCESSOR_CONFIG
from .preprocessor import Preprocessor, siglip_preprocessor
from .prompt import VICUNA, Tokenizer


@dataclass(frozen=True)
class Processor:
    """What turns a prompt and images into ids and pixels."""

    tokenizer: Tokenizer
    image: Preprocessor
    image_token: str
    name: str  # of the checkpoint, as the user gave it
    folder: Path | None = None  # where it lies; None where adapters changed the model

    @property
    def is_scenes(self) -> bool:
        """Is this the built-in model or a larger one of the same kind, which know drawings only?"""
        return self.name in ("scenes", *DRAWN_MODELS)


def read_processor(checkpoint: Checkpoint, config: VLMConfig, name: str, folder: Path) -> Processor:
    """The processor of a checkpoint that was read from `folder`. Raises UserError."""
    image = read_preprocessor(checkpoint.preprocessor_folder, config.vision)
    if is_llava(checkpoint.config) and pads_to_square(checkpoint.config.get("published")):
        image = replace(image, pad=True)
    tokenizer = Tokenizer.from_folder(checkpoint.tokenizer_folder, folder)
    check_vocabulary(tokenizer.backend, tokenizer.name, config.text.vocab_size)
    if is_llava(checkpoint.config) and tokenizer.chat_template is None:
        tokenizer.chat_template = VICUNA
    return Processor(tokenizer, image, config.image_token, name, folder)


def check_vocabulary(tokenizer: tokenizers.Tokenizer, name: str, size: int) -> None:
    """Raises UserError for a tokenizer that was made for another model than one of `size` words.

    Tokens that were added may lie beyond the words, and a model may have some words to spare. All
    words are gone through only where their number and the last one's do not agree: what then lies
    beyond all the same is refused in a prompt.
    """
    words, count = tokenizer.get_vocab_size(with_added_tokens=False), tokenizer.get_vocab_size()
    last = words - 1
    if not 0 < words <= size or tokenizer.id_to_token(last) is None:
        ids = {*tokenizer.get_vocab(with_added_tokens=False).values()}
        last = max(ids - {*tokenizer.get_added_tokens_decoder()}, default=-1)
    if last >= size or 2 * count < size:
        number = f"has a word {last}" if last >= size else f"has {count} words"
        raise UserError(
            f"{name}: its tokenizer {number}, and the model's vocabulary {size}; they do not belong"
            " together"
        )


def read_preprocessor(folder: Path | None, vision: CLIPConfig) -> Preprocessor:
    """The one in the folder, or the tower's usual; it must make the pictures the tower reads."""
    side = vision.image_size
    usual = Preprocessor(size=side, crop=(side, side))
    if isinstance(vision, SiglipConfig):
        usual = siglip_preprocessor(side)
    if folder is None:
        return usual
    image = Preprocessor.from_folder(folder, usual)
    if (image.crop or image.size) != (side, side):
        raise UserError(
            f"{folder / PREPROCESSOR_CONFIG} makes pictures of {image.crop or image.size}"
            f" pixels, but the tower reads {side} x {side}"
        )
    return image
