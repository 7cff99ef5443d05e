"""How VQA and TextVQA normalise answers before they compare them.

In the order of the published rule: lower case; commas and question marks are removed; "'s" becomes
a word; a punctuation sign is removed if it stands beside a space anywhere in the text, else it
becomes a space; a full stop is removed unless a digit follows; number words become digits;
articles are removed; contractions get their apostrophe. The rule is kept as published: "yes-no"
and "yes - no" differ, and "none" is 0.

Contractions are built from stems and endings. The published table has a few more that no ending
builds ("somebody'd" loses its apostrophe there), and some for a capital "I", which lower case
never matches; these are left out.
"""

import re

SIGNS = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = {"a", "an", "the"}
DIGITS = {
    word: str(n)
    for n, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}

_PRONOUNS = "somebody someone something"
_STEMS = {
    "n't": "ai are ca could did do does had has have is might must need ought sha should was"
    " were wo would",
    "'ve": "could might not should they we what where who would you",
    "'s": f"he how that there what when where who why {_PRONOUNS}",
    "'d": f"he how it there they where who you {_PRONOUNS}",
    "'ll": f"how it they what who why you {_PRONOUNS}",
    "'re": "there they what why you",
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
    return contractions


CONTRACTIONS = _contractions()


def normalise(answer: str) -> str:
    """The form of an answer that the rule compares."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = re.sub(r"\.(?!\d)", "", _without_signs(re.sub(r"[\n\t]", " ", text).strip()))
    words = [DIGITS.get(word, word) for word in text.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_signs(text: str) -> str:
    before = text
    for sign in SIGNS:
        beside_a_space = f"{sign} " in before or f" {sign}" in before
        text = text.replace(sign, "" if beside_a_space else " ")
    return text
