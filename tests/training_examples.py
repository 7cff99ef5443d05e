"""Examples to train on, and files of them."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_prune.inputs.preprocessor import Preprocessor
from mlx_vlm_prune.inputs.processor import Processor
from mlx_vlm_prune.inputs.prompt import Tokenizer
from mlx_vlm_prune.scenes.vocabulary import write as write_words
from mlx_vlm_prune.training.examples import Example, tokenize_example


def png(colour=0, size=(8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (colour, 90, 20)).save(buffer, "PNG")
    return buffer.getvalue()


def talk(*words, keys=("role", "content"), speakers=("user", "assistant")):
    return [{keys[0]: speakers[n % 2], keys[1]: text} for n, text in enumerate(words)]


def write_lines(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    return path


def write_rows(path, conversations, images, **options):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow reads parquet files")
    import pyarrow.parquet as parquet

    table = pyarrow.table({"conversations": conversations, "image_bytes": images})
    parquet.write_table(table, path, **options)
    return path


def of_words(folder) -> Processor:
    write_words(folder)
    return Processor(Tokenizer.from_folder(folder), CLIP_64, "@", "words")


CLIP_64 = Preprocessor(size=64, crop=(64, 64))
CONFIG = SimpleNamespace(N=16, text=SimpleNamespace(vocab_size=200, max_position_embeddings=512))


def example(images, *turns, system="", where="it"):
    return Example(tuple(images), turns, where, system)


def learned(processor, example, options=None, most=10_000):
    """The ids of the answers, one list an answer."""
    read = tokenize_example(processor, example, CONFIG.N, most, options)
    edges = np.flatnonzero(np.diff([0, *read.is_answer.astype(int), 0]))
    return [read.prompt.ids[a:b] for a, b in edges.reshape(-1, 2)]
