"""Names of many tensors in one line: the numbers of layers and experts as ranges."""

import re
from collections.abc import Iterable
from itertools import groupby, product

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def list_names(names: Iterable[str]) -> str:
    """All of the names, in the order of their first ones: "layers.0-3.norm.weight, head.weight".

    Names that differ in their numbers alone are one, where no combination of these is left out.
    """
    numbers: dict[str, list[tuple[int, ...]]] = {}
    for name in names:
        values = tuple(map(int, NUMBER.findall(name)))
        numbers.setdefault(NUMBER.sub("{}", name), []).append(values)
    listed = []
    for form, combinations in numbers.items():
        axes = [sorted({*axis}) for axis in zip(*combinations, strict=True)]
        if {*product(*axes)} == {*combinations}:
            listed.append(form.format(*map(_ranges, axes)))
        else:
            listed += [form.format(*values) for values in combinations]
    return ", ".join(listed)


def _ranges(values: list[int]) -> str:
    """Ascending numbers: "0-3,7"."""
    runs = [
        [value for _, value in run]
        for _, run in groupby(enumerate(values), key=lambda pair: pair[1] - pair[0])
    ]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
