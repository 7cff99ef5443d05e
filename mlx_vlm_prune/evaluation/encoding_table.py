"""The result of `encode` as a table of fixed width, with notes below it."""

from typing import Any

Row = dict[str, Any]


def table(result: dict[str, Any]) -> str:
    """A line for each case, and notes on what the figures are."""
    lines = [_cells(row, result) for row in result["rows"]]
    titles = list(lines[0])
    widths = [max(len(line[t]) for line in [dict(zip(titles, titles, strict=True)), *lines])
              for t in titles]  # fmt: skip
    text = [_join(titles, widths)]
    text += [_join(list(line.values()), widths) for line in lines]
    return "\n".join([*text, "", *_notes(result)])


def _cells(row: Row, result: dict[str, Any]) -> dict[str, str]:
    spread, rate = row["ms_spread"], row["images_per_second"]
    cells = {
        "pruner": row["pruner"],
        "tokens": f"{row['tokens']} of {row['of']}",
        "share": f"{row['tokens'] / row['of']:.0%}",
        "ms/image": f"{row['ms']:.2f}",
        "±": "–" if spread is None else f"{spread:.2f}",
        "images/s": f"{rate:.1f}" if rate > 10 else f"{rate:.2f}",
        "speed": f"{row['speed_up']:.2f} x",
        "cosine": f"{row['cosine']:.4f}",
        "least": f"{row['cosine_least']:.4f}",
    }
    if "same_text" in row:
        cells["same text"] = f"{row['same_text']:.1%}"
    if "accuracy" in row:
        cells["accuracy"] = f"{row['accuracy']:.1%}"
        cells["to full"] = _interval(row["to_full"])
    return cells


def _interval(figures: list[float | None]) -> str:
    difference, low, high = figures
    assert difference is not None
    if low is None or high is None:
        return f"{100 * difference:+.1f}"
    return f"{100 * difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _join(cells: list[str], widths: list[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    line = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
    return "  ".join(line).rstrip()


def _notes(result: dict[str, Any]) -> list[str]:
    count, batch, runs = (result[name] for name in ("images", "batch_size", "runs"))
    lines = [
        f"{count} image{'s' * (count != 1)}, {batch} at once, in turns, {runs} of each batch. ms:"
        " the tower with the pruner and what makes the embedding, median ± half the distance of the"
        f" quartiles; opening an image takes {result['image_ms']:.2f} ms more.",
        "Cosine: between the embedding and that of all tokens, the mean and the least.",
    ]
    if result["texts"]:
        lines.append(
            f"Same text: of {len(result['texts'])} texts the nearest one is the same as with all"
            " tokens."
        )
    if result["labelled"]:
        lines.append(
            f"Accuracy: zero-shot, of {result['labelled']} images with a class; the difference to"
            " full in points, with a 95 % interval from 20 images on (paired bootstrap)."
        )
    tokens_of: dict[str, list[str]] = {}
    for refusal in result["refused"]:
        tokens_of.setdefault(refusal["why"], []).append(str(refusal["tokens"]))
    lines += [f"Not run: {why} ({', '.join(K)} tokens)" for why, K in tokens_of.items()]
    return [*lines, *(f"Skipped: {message}" for message in result["skipped"])]
