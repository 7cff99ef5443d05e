"""What each text of a page belongs to: the names of its row and column, its line, its bar.

A question about a page asks for one text by another: a number by the names of its row and column,
a bar by its height. While the tower learns, each patch of a text or of a bar must name these.
"""

from mlx_vlm_prune.scenes import pages
from mlx_vlm_prune.scenes.pages.page import Shape
from mlx_vlm_prune.scenes.pages.words import PRINTED

LINES = 16  # lines that are told apart
HEIGHT = 8  # pixels; the tops of bars are told apart by these
# What a patch must name, and among how many: of names in the middle of the language model, which
# reads the words before it, and of all else behind the tower.
NAMES = {
    "row": len(PRINTED),  # the word at the left end of its line
    "column": len(PRINTED),  # the word at the head of its column
}
PLACES = {
    "bar": 3,  # neither, the highest, the lowest of a chart
    "top": pages.LARGE.side // HEIGHT,  # of the bar or the point, from the page's upper edge
    "line": LINES,  # counted from the top
    "lines": LINES,  # how many a question counts
}
BINDINGS = NAMES | PLACES


def bindings(page: pages.Page) -> list[dict[str, int]]:
    """For each text of a page, what it belongs to: places within BINDINGS."""
    if charted := bars(page):
        return [charted[text.text.lower()][1] for text in page.texts]
    return [_row_and_column(page, text) | _line(page, text) for text in page.texts]


def _row_and_column(page: pages.Page, text: pages.Text) -> dict[str, int]:
    """The names of rows of a receipt, a table or a form, and of a table's columns."""
    if page.layout not in ("receipt", "table", "form"):
        return {}
    line = [other for other in page.texts if other.y == text.y]
    names = {"row": min(line, key=lambda other: other.box[0])}
    if page.layout == "table":
        if not text.text.isdigit():
            return {}
        column = [other for other in page.texts if other.x == text.x and other.anchor == "rm"]
        names["column"] = min(column, key=lambda other: other.y)
    return {
        name: PRINTED.index(other.text.lower())
        for name, other in names.items()
        if other is not text
    }


def bars(page: pages.Page) -> dict[str, tuple[Shape, dict[str, int]]]:
    """The polygon of each bar or point of a chart, by name, and what it must name; none of other
    pages."""
    heights, named = page.facts.heights, {}
    ranked = sorted(heights, key=heights.__getitem__)
    polygons = [shape for shape in page.shapes if shape.is_polygon]
    for name, polygon in zip(heights, polygons, strict=True):
        x, y = zip(*polygon.points, strict=True)
        top = int(page.turned(sum(x) / len(x), min(y))[1] / HEIGHT)
        rank = 1 if name == ranked[-1] else 2 if name == ranked[0] else 0
        named[name] = polygon, {"bar": rank, "top": top}
    return named


def _line(page: pages.Page, text: pages.Text) -> dict[str, int]:
    """Its line within the page, or within its column of running text."""
    is_left = text.x < page.side / 2
    same = [t for t in page.texts if page.layout != "columns" or (t.x < page.side / 2) == is_left]
    line = {"line": sorted({other.y for other in same}).index(text.y)}
    counted = list(page.facts.lines.values())  # of a receipt one number, of two columns two
    return line | ({"lines": counted[-1 if not is_left else 0]} if counted else {})
