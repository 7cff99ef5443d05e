"""Where texts and bars of a page stand among the others, and which digits a number has.

Most questions about a page ask for one text by another or by a bar. While the tower learns, the
patches of texts and bars must name what such questions need.
"""

from mlx_vlm_prune.scenes import pages
from mlx_vlm_prune.scenes.pages.page import Shape

LINES = 16  # lines that are told apart, and words of a line
TOP_STEP = 8  # pixels; the tops of bars are told apart by these
DIGITS = ("first digit", "second digit", "third digit")
NO_DIGIT = 10  # of a number that has fewer
# What a patch must name, and among how many.
LAYOUT_GROUPS = {
    "bar": 3,  # neither, the highest, the lowest of a chart
    "top": pages.LARGE.side // TOP_STEP,  # of the bar or the point, from the picture's upper edge
    "line": LINES,  # counted from the top
    "lines": LINES,  # how many a question counts
    "word": LINES,  # of its line, counted from the left
    **dict.fromkeys(DIGITS, NO_DIGIT + 1),
}


def text_targets(page: pages.Page) -> list[dict[str, int]]:
    """For each text of a page, what its patches must name: places within LAYOUT_GROUPS."""
    if charted := bars(page):
        return [charted[text.text.lower()][1] for text in page.texts]
    return [_line(page, text) | _digits(text.text) for text in page.texts]


def _digits(text: str) -> dict[str, int]:
    if not text.isdigit():
        return {}
    none = [NO_DIGIT] * (len(DIGITS) - len(text))  # a total has three digits at most
    return dict(zip(DIGITS, [*map(int, text), *none], strict=True))


def bars(page: pages.Page) -> dict[str, tuple[Shape, dict[str, int]]]:
    """The polygon of each bar or point of a chart, by name, and what it must name; none of other
    pages."""
    heights, targets = page.facts.heights, {}
    ranked = sorted(heights, key=heights.__getitem__)
    polygons = [shape for shape in page.shapes if shape.is_polygon]
    for name, polygon in zip(heights, polygons, strict=True):
        x, y = zip(*polygon.points, strict=True)
        top = int(page.turned(sum(x) / len(x), min(y))[1] / TOP_STEP)
        rank = 1 if name == ranked[-1] else 2 if name == ranked[0] else 0
        targets[name] = polygon, {"bar": rank, "top": top}
    return targets


def _line(page: pages.Page, text: pages.Text) -> dict[str, int]:
    """Its line within the page, or within its column of running text, and its place there."""
    is_left = text.x < page.side / 2
    column = [t for t in page.texts if page.layout != "columns" or (t.x < page.side / 2) == is_left]
    line = sorted({other.y for other in column}).index(text.y)
    word = sorted(other.box[0] for other in column if other.y == text.y).index(text.box[0])
    if page.layout == "table" and not line:
        word += 1  # as the numbers of its column, before which their row's name stands
    counted = list(page.facts.lines.values())  # of a receipt one number, of two columns two
    counts = {"lines": counted[0 if is_left else -1]} if counted else {}
    return {"line": line, "word": word} | counts
