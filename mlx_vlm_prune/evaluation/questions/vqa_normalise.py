"""How VQA and TextVQA normalise answers before they compare them.

In the order of the published rule: lower case; commas and question marks are removed; "'s" becomes
a word; a punctuation sign is removed if it stands beside a space anywhere in the text, else it
becomes a space; a full stop is removed unless a digit follows; number words become digits;
articles are removed; contractions get their apostrophe. The rule is kept as published: "yes-no"
and "yes - no" differ, and "none" is 0.

`normalise` is that rule as answers are normalised before they are handed in. VQA's own script does
only what `without_punctuation` and `by_words` do, so commas and "'s" stay longer: there, and only
there, a comma between digits makes every sign vanish.

Contractions are built from stems and endings; MORE are those that no ending builds, one of them
the wrong way round, as published. Those for a capital "I", which lower case never matches, are left
out.
"""

import re
from functools import lru_cache

SIGNS = ';/[]"{}()=+\\_-><@`,?!'
REMEMBERED = 1 << 16  # answers whose form is kept: most are given again and again
MOST_STOPS = 32  # the published script removes no more
ARTICLES = {"a", "an", "the"}
DIGITS = {
    word: str(n)
    for n, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}

_PRONOUNS = "somebody someone something"
_STEMS = {
    "n't": "ai are ca could did do does had has have is might must need ought sha should was"
    " were wo would",
    "'ve": "could might must not should they we what where who would you",
    "'s": "he how that there what when where who why somebody someone",
    "'d": "he how it there they where who you someone something",
    "'ll": f"how it they what who why you {_PRONOUNS}",
    "'re": "there they what why you",
}
MORE = {
    "somebody'd": "somebodyd",
    **dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at"),
    **dict.fromkeys(("yall'll", "y'allll"), "y'all'll"),
    **dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've"),
}
_DOUBLE_ENDINGS = {
    "n't've": "could had might should would",
    "'d've": f"he it she there they we who you {_PRONOUNS}",
}


def _contractions() -> dict[str, str]:
    contractions = {"maam": "ma'am", "oclock": "o'clock", "twas": "'twas", "yall": "y'all"}
    for ending, stems in _STEMS.items():
        for stem in stems.split():
            contractions[stem + ending.replace("'", "")] = stem + ending
    for ending, stems in _DOUBLE_ENDINGS.items():
        for stem in stems.split():
            first, last = ending[:-3], "'ve"
            contractions[stem + first.replace("'", "") + last] = stem + ending
            contractions[stem + first + "ve"] = stem + ending
    return contractions | MORE


CONTRACTIONS = _contractions()


@lru_cache(maxsize=REMEMBERED)
def normalise(answer: str) -> str:
    """The form of an answer that the rule compares."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return by_words(without_punctuation(without_breaks(text)))


def without_breaks(text: str) -> str:
    """The text on one line, stripped."""
    return text.strip().replace("\n", " ").replace("\t", " ").strip()


def without_punctuation(text: str) -> str:
    """The text without its signs, and without the full stops that no digit follows."""
    before, has_digits_with_comma = text, re.search(r"\d,\d", text) is not None
    for sign in SIGNS:
        beside_a_space = f"{sign} " in before or f" {sign}" in before
        text = text.replace(sign, "" if beside_a_space or has_digits_with_comma else " ")
    return re.sub(r"\.(?!\d)", "", text, count=MOST_STOPS)


def by_words(text: str) -> str:
    """The words in lower case: numbers as digits, no articles, contractions with apostrophes."""
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
