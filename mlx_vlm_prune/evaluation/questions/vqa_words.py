"""How VQA and TextVQA make answers alike before they are compared.

In the order of the published rule: lower case; commas and question marks go; "'s" becomes a
word; a sign goes where the text has it beside a space, and becomes a space where it has not;
a full stop goes unless a digit follows; number words become digits; articles go; contractions
get their apostrophe. As published, oddities too: "yes-no" and "yes - no" differ, "none" is 0.

The contractions are made from stems and endings. The published table has a few more that no
ending makes ("somebody'd" loses its apostrophe there) and some for "I" in capitals, which
lower case hides from it; these are left out.
"""

import re

SIGNS = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = {"a", "an", "the"}
DIGITS = {
    word: str(n)
    for n, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}

_SOMEONE = "somebody someone something"
_STEMS = {
    "n't": "ai are ca could did do does had has have is might must need ought sha should was"
    " were wo would",
    "'ve": "could might not should they we what where who would you",
    "'s": f"he how that there what when where who why {_SOMEONE}",
    "'d": f"he how it there they where who you {_SOMEONE}",
    "'ll": f"how it they what who why you {_SOMEONE}",
    "'re": "there they what why you",
}
_DOUBLE = {
    "n't've": "could had might should would",
    "'d've": f"he it she there they we who you {_SOMEONE}",
}


def _contractions() -> dict[str, str]:
    made = {"maam": "ma'am", "oclock": "o'clock", "twas": "'twas", "yall": "y'all"}
    for ending, stems in _STEMS.items():
        for stem in stems.split():
            made[stem + ending.replace("'", "")] = stem + ending
    for ending, stems in _DOUBLE.items():
        for stem in stems.split():
            first, last = ending[:-3], "'ve"
            made[stem + first.replace("'", "") + last] = stem + ending
            made[stem + first + "ve"] = stem + ending
    return made


CONTRACTIONS = _contractions()


def normalise(answer: str) -> str:
    """An answer as the rule compares it."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = re.sub(r"\.(?!\d)", "", _signs(re.sub(r"[\n\t]", " ", text).strip()))
    words = [DIGITS.get(word, word) for word in text.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _signs(text: str) -> str:
    before = text
    for sign in SIGNS:
        beside_a_space = f"{sign} " in before or f" {sign}" in before
        text = text.replace(sign, "" if beside_a_space else " ")
    return text
