"""CIDEr-D and ROUGE-L of captions, by the rules of pycocoevalcap, and its way to split words.

CIDEr (arXiv:1411.5726): the cosine of n-grams' tf-idf vectors, n from 1 to 4. A document is an
image, all its references together. Weights of a caption are clipped at the reference's, and a
difference in length costs by a Gaussian; the mean over n and references is multiplied by 10, so a
score lies between 0 and 10. Papers print 100 times the mean over all images.

pycocoevalcap splits captions by Stanford's PTBTokenizer, a Java program, and leaves punctuation
out. `words` comes close to it without Java; docs/evaluation.md says how close.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

LONGEST = 4  # words of an n-gram
SIGMA = 6.0  # of the Gaussian over differences in length
BETA = 1.2  # how much more ROUGE-L's recall weighs than its precision
NGram = tuple[str, ...]

_PIECE = re.compile(
    r"""
      \d+:\d\d                                         # 10:30, also before pm
    | (?<!\S)-?\d+(?:[.,/-]\d+)*(?:-?[a-z][a-z0-9'-]*)?  # -10, 3.5, 1,000, 1/2, 2nd, 3-way
    | \d+(?:[.,/-]\d+)*(?:-?[a-z][a-z0-9'-]*)?
    | (?:[a-z]\.){2,} | ph\.d\.                         # u.s.
    | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc|ave|blvd|jan|feb|aug|sept|oct|nov|dec)\.(?=\s\S)
    | no\.(?=\s?\d)
    | n't\b | '(?:s|m|d|re|ve|ll)\b | '\d\ds\b | '?n'(?!\w)
    | [^\W_]+(?:(?:-+|/|_|(?<=[a-z])\.(?=[a-z])|'(?!(?:s|m|d|re|ve|ll|t)\b))[^\W_]+)*
    | [&#%$@*+=<>|~^\\_/()\[\]{}]
    """,
    re.VERBOSE,
)
_NOT = re.compile(r"(\w)(n't)\b")
_TWO_WORDS = re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b|\b(gim|lem)(me)\b")
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


def words(caption: str) -> list[str]:
    """The words of a caption in lower case, without punctuation."""
    text = _NOT.sub(r"\1 \2", caption.lower().replace("’", "'").replace("`", "'"))
    text = _TWO_WORDS.sub(lambda match: " ".join(filter(None, match.groups())), text)
    return [_BRACKETS.get(piece, piece) for piece in _PIECE.findall(text)]


def ngrams(caption: Sequence[str]) -> Counter[NGram]:
    """How often each n-gram of up to LONGEST words occurs."""
    spans = ((i, n) for n in range(1, LONGEST + 1) for i in range(len(caption) - n + 1))
    return Counter(tuple(caption[i : i + n]) for i, n in spans)


@dataclass(frozen=True)
class DocumentFrequencies:
    """In the references of how many of `images` each n-gram occurs."""

    images: int
    counts: Mapping[NGram, int]

    @classmethod
    def of(cls, references: Iterable[Sequence[Sequence[str]]]) -> "DocumentFrequencies":
        """Of every image the words of its references."""
        documents = [
            {g for caption in captions for g in ngrams(caption)} for captions in references
        ]
        return cls(len(documents), Counter(ngram for grams in documents for ngram in grams))

    def vector(self, caption: Sequence[str]) -> "Vector":
        """The tf-idf weights of a caption's n-grams; one that no reference has counts as one."""
        log_images = math.log(self.images)
        weights: list[dict[NGram, float]] = [{} for _ in range(LONGEST)]
        for ngram, count in ngrams(caption).items():
            rarity = log_images - math.log(max(1, self.counts.get(ngram, 0)))
            weights[len(ngram) - 1][ngram] = count * rarity
        norms = [math.sqrt(sum(x * x for x in of_n.values())) for of_n in weights]
        return Vector(weights, norms, max(0, len(caption) - 1))


@dataclass(frozen=True)
class Vector:
    """A caption's weights for each n, their norms, and its length in pairs of words."""

    weights: list[dict[NGram, float]]
    norms: list[float]
    pairs: int

    def similarity(self, reference: "Vector") -> float:
        """The mean over n of the clipped cosine with a reference, less for another length."""
        total = 0.0
        for n, weights in enumerate(self.weights):
            others, norms = reference.weights[n], self.norms[n] * reference.norms[n]
            shared = weights.keys() & others.keys()
            if norms:
                products = (min(weights[g], others[g]) * others[g] for g in shared)
                total += math.fsum(products) / norms
        gaussian = math.exp(-((self.pairs - reference.pairs) ** 2) / (2 * SIGMA**2))
        return gaussian * total / LONGEST


@dataclass(frozen=True)
class References:
    """The words of an image's reference captions, among those of a set of images."""

    captions: tuple[tuple[str, ...], ...]
    frequencies: DocumentFrequencies

    def __repr__(self) -> str:  # which names the questions that a run was begun with
        return f"References({self.captions}, {self.frequencies.images})"

    @cached_property
    def vectors(self) -> list[Vector]:
        return [self.frequencies.vector(caption) for caption in self.captions]

    def cider(self, caption: Sequence[str]) -> float:
        """CIDEr-D of a caption, 0 to 10. Where the set is a single image nothing is rare: 0."""
        vector = self.frequencies.vector(caption)
        scores = [vector.similarity(reference) for reference in self.vectors]
        return 10 * sum(scores) / len(scores)


def rouge_l(caption: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-L of a caption, 0 to 1: the longest common subsequence as a share of the caption and
    of the reference, each at best over the references, in an F-measure."""
    caption = caption or [""]  # the split of an empty text has one empty word
    lengths = [(_common_length(caption, r or [""]), len(r) or 1) for r in references]
    precision = max(common for common, _ in lengths) / len(caption)
    recall = max(common / length for common, length in lengths)
    if not precision:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common_length(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = row
        row = [0]
        for j, other in enumerate(b):
            row.append(before[j] + 1 if word == other else max(before[j + 1], row[j]))
    return row[-1]
