"""Promises of a tokenizer beside a model: one that was made for another model is refused."""

import json
import shutil

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.inputs.processor import check_vocabulary
from mlx_vlm_prune.inputs.prompt import Tokenizer
from mlx_vlm_prune.scenes import CHECKPOINT


def tokenizer(words: int, added: int = 0) -> Tokenizer:
    """One of so many words, with tokens that were added behind them."""
    backend = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, "w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_tokens([f"<{i}>" for i in range(added)])
    return Tokenizer(backend, name="here")


@pytest.mark.parametrize(
    ("words", "added", "size"),
    [(100, 0, 100), (100, 2, 100), (98, 2, 100), (60, 0, 100), (40, 10, 100), (1, 0, 2)],
)
def test_words_to_spare_and_added_tokens_beyond_are_usual(words, added, size):
    check_vocabulary(tokenizer(words, added).backend, "here", size)


def test_the_words_of_a_usual_tokenizer_are_not_gone_through():
    class Counting:
        """A tokenizer of 150,000 words, which takes a tenth of a second to list."""

        def get_vocab_size(self, with_added_tokens=True):
            return 150_000

        def id_to_token(self, number):
            return "word" if number < 150_000 else None

    check_vocabulary(Counting(), "here", 151_936)


@pytest.mark.parametrize(
    ("words", "size", "sentence"),
    [
        (101, 100, "here: its tokenizer has a word 100, and the model's vocabulary 100; they do"),
        (49, 100, "here: its tokenizer has 49 words, and the model's vocabulary 100; they do not"),
        (90, 6400, "has 90 words, and the model's vocabulary 6400"),  # the scenes', a MiniMind's
    ],
)
def test_another_models_tokenizer_is_refused(words, size, sentence):
    with pytest.raises(UserError, match=sentence):
        check_vocabulary(tokenizer(words).backend, "here", size)


def test_a_model_is_told_by_its_files_and_not_by_its_name(tmp_path):
    """The scenes model with another model's words beside it, in a folder called scenes."""
    folder = shutil.copytree(CHECKPOINT, tmp_path / "scenes")
    load(folder)
    backend = json.loads((folder / "tokenizer.json").read_text())
    size = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    backend["model"]["vocab"] |= {f"more{i}": size + i for i in range(30)}
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    with pytest.raises(UserError, match="they do not belong together"):
        load(folder)
