"""All the words of the drawn worlds, as a tokenizer in MiniMind2's chat format.

Whole words, lower-cased; a sign's letters are pieces (`k ##e ##x` is "kex"), and of a number its
digits. `python -m mlx_vlm_prune.scenes.vocabulary FOLDER` writes tokenizer.json and
tokenizer_config.json; with `--large` those with the words of pages and numbers above 9.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ..checkpoints.command_line import Parser, in_one_sentence
from ..checkpoints.processor import TOKENIZER, TOKENIZER_CONFIG
from ..checkpoints.reading.files import write_atomically
from .draw import CELLS, COLOURS, LETTERS, SHAPES
from .pages.words import PRINTED
from .questions import plural

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2 as MiniMind2 has them
UNKNOWN = "<unk>"
IMAGE_TOKEN = "@"
SLOTS = ("first", "second", "third")  # which letter of the sign, in dense training targets
PLACES = ("edge", "middle")  # which part of a thing, likewise
FUNCTION_WORDS = (
    "system user assistant a an the is are there in of or at on it and you can see how many what "
    "which where colour cell read say says does sign shape shapes left right above below nothing "
    "yes no picture image this describe ? . , ! : -"
).split()
PAGE_WORDS = (
    "much total row column highest lowest bar month word lines items receipt printed page"
).split()
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def words() -> list[str]:
    """Every token, in the order of its id."""
    letters = LETTERS.lower()
    tokens = [*SPECIAL, UNKNOWN, IMAGE_TOKEN, *FUNCTION_WORDS, *SHAPES, *map(plural, SHAPES)]
    tokens += [*COLOURS, *map(str, range(10)), *CELLS, *SLOTS, *PLACES]
    tokens += [*letters, *("##" + letter for letter in letters)]
    return list(dict.fromkeys(tokens))


def large_words() -> list[str]:
    """Those of `words`, of pages and of numbers with several digits, in the order of their ids."""
    digits = ("##" + digit for digit in "0123456789")
    return list(dict.fromkeys([*words(), *PAGE_WORDS, *PRINTED, *digits]))


def tokenizer(tokens: Sequence[str] | None = None) -> Tokenizer:
    """The tokenizer itself, of `words` or of other tokens in the order of their ids."""
    vocabulary = {word: i for i, word in enumerate(words() if tokens is None else tokens)}
    wordpiece = Tokenizer(
        models.WordPiece(vocabulary, unk_token=UNKNOWN, max_input_chars_per_word=64)
    )
    wordpiece.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace("color", "colour")]
    )
    wordpiece.pre_tokenizer = (
        pre_tokenizers.BertPreTokenizer()
    )  # spaces and punctuation; each @ alone
    wordpiece.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    wordpiece.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in SPECIAL]
    )
    return wordpiece


def write(folder: Path, tokens: Sequence[str] | None = None) -> None:
    """Write tokenizer.json and tokenizer_config.json into a folder; `tokens` as in `tokenizer`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / TOKENIZER, tokenizer(tokens).to_str(pretty=True))
    config = {
        "bos_token": SPECIAL[1],
        "chat_template": CHAT_TEMPLATE,
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNKNOWN,
    }
    text = json.dumps(config, indent=4, sort_keys=True) + "\n"
    write_atomically(folder / TOKENIZER_CONFIG, text)


def build_parser() -> Parser:
    """The command line."""
    parser = Parser("mlx_vlm_prune.scenes.vocabulary", description="Write the tokenizer.")
    parser.add_argument("folder", type=Path, help="where its two files go")
    parser.add_argument(
        "--large", action="store_true", help="with the words of pages and numbers above 9"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    parser = build_parser()
    with in_one_sentence(parser):
        args = parser.parse_args(argv)
        write(args.folder, large_words() if args.large else None)


if __name__ == "__main__":
    main()
