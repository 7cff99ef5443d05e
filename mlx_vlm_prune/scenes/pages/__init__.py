"""Printed pages as a second drawn world: receipts, tables, forms, charts, text in two columns.

words.py is what can be printed, layouts.py puts it on a page, draw.py makes the picture,
questions.py asks about it. Numpy and Pillow only, as in the rest of this package.
"""

from .draw import draw
from .layouts import LAYOUTS, compose
from .page import FONTS, LARGE, SMALL, Facts, Page, PageSize, Text
from .questions import KINDS, ODDS, ask, page_questions

__all__ = [
    "FONTS", "KINDS", "LARGE", "LAYOUTS", "ODDS", "SMALL", "Facts", "Page", "PageSize", "Text",
    "ask", "compose", "draw", "page_questions",
]  # fmt: skip
