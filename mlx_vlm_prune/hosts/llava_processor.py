"""mlx-vlm's processor of LLaVA, mended on its instance for transformers 5.20 and later.

It gives the image processor the options of the tokenizer, such as `padding`, which is refused there
(Blaizzy/mlx-vlm#870). Here pictures and words get each their own.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoints.mlx_vlm_folder import RECORD
from ..checkpoints.reading.files import optional_json

LLAVA = "llava"
WORD_OPTIONS = ("padding", "padding_side", "add_special_tokens", "truncation", "max_length")


class ImagesAlone:
    """Mixin before an image processor's class: it leaves out the options of words."""

    def __call__(self, images: Any, **options: Any) -> Any:
        stock: Any = super()
        kept = {name: value for name, value in options.items() if name not in WORD_OPTIONS}
        return stock.__call__(images, **kept)


def mend(processor: Any) -> Callable[[], None]:
    """Give pictures and words each their own options, until the function that is returned is
    called. Of a folder in place of a processor: when mlx-vlm loads one from there."""
    if isinstance(processor, Path):
        _mend_in_pruned_folders()
        return lambda: None
    image_processor = getattr(processor, "image_processor", None)
    base = type(image_processor)
    if image_processor is None or issubclass(base, ImagesAlone):
        return lambda: None
    attributes = {"__module__": base.__module__}
    image_processor.__class__ = type(base.__name__, (ImagesAlone, base), attributes)
    return lambda: setattr(image_processor, "__class__", base)


def is_unmended(problem: Exception) -> bool:
    """Is this how a processor fails that was not mended?"""
    text = str(problem)
    return "keyword argument" in text and any(f"'{name}'" in text for name in WORD_OPTIONS)


@functools.cache
def _mend_in_pruned_folders() -> None:
    """Have mlx-vlm mend the processors that it loads from folders of `prune-into`, and from no
    others, by its own way to say who loads a processor."""
    from mlx_vlm.models.base import install_auto_processor_patch
    from mlx_vlm.models.llava.processing_llava import LlavaProcessor

    class PrunedFolderProcessor:
        @staticmethod
        def from_pretrained(folder: Any, **options: Any) -> Any:
            if RECORD not in optional_json(Path(folder) / "config.json"):
                raise LookupError(f"{folder} does not prune")  # whoever came before takes it
            processor = LlavaProcessor.from_pretrained(folder, **options)
            mend(processor)
            return processor

    install_auto_processor_patch(LLAVA, PrunedFolderProcessor)
