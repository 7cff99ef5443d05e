"""docs/hosts.md: what works in which of mlx-vlm's families, by what the families say of themselves.

Written by `python -m benchmarks.report`.
"""

from collections.abc import Callable, Mapping

from mlx_vlm_prune.hosts.compatibility import BETWEEN_LAYERS, SLOTS_OF_TILES, why_not_in_family
from mlx_vlm_prune.hosts.families import FAMILIES, REFUSED
from mlx_vlm_prune.hosts.host import Host
from mlx_vlm_prune.pruners import METHODS, PRESETS, Pruner, Stage, plan

from .readme_tables import markdown

Family = type[Host]
INTRODUCTION = """\
# Families of mlx-vlm

What works inside mlx-vlm's models, family by family. A number is a reason, listed below. Methods
that a "yes" leaves out are under "Limits" and "In no family".
This page is made from what the code declares (`python -m benchmarks.report`); nothing is written by
hand, and the tests check every entry with a tiny model.

With all tokens kept every family answers as mlx-vlm alone does, bit for bit. With fewer tokens it
answers as a model that reads the short sequence without a cache, to 1e-4 of log probabilities. Both
hold when prompts are read in pieces, in batches and in blocks of `pruned()`.

Methods between the tower's layers (`tome`, `ipcv` and the others of the stage `encoder`) run the
tower from here, layer by layer. Where m x m patches become one visual token, they leave or merge
together, as one long token. Their rotation, their place in a window of attention and what DeepStack
adds go along. The result is that of a loop over the tower's tokens, to 1e-4.

A prompt of any family may have several images. With several images FastVLM, LLaVA-NeXT and
PaliGemma answer differently from mlx-vlm alone, which puts words in wrong places, reads only the
first image or refuses the second ([faults](upstream/mlx-vlm-faults.md)). Here they answer as a
model that reads the sequence without a cache, to 1e-4.

A "yes" under "video" is for all that reads [videos](video.md).
"""
COUNTED = "it counts the rows it is given"
# Of each column what stands in the way in a family, None where nothing does.
COLUMNS: dict[str, Callable[[Family], str | None]] = {
    "after the tower": lambda family: None,
    "between the tower's layers": lambda family: family.why_no_encoder_methods,
    "between the language model's layers": lambda family: (
        None if family.language_layers_class else family.why_no_decoder_methods
    ),
    "`zoo_prune`": lambda family: family.why_no_probe,
    "`restore`": lambda family: family.why_no_enhancer,
    "kept positions": lambda family: None if family.has_mrope else COUNTED,
    "batches of prompts": lambda family: family.why_no_batches,
    "`serve`": lambda family: None,
    "`prune-into`": lambda family: None,
    "learned methods": lambda family: family.why_not_learned,
    "predicted costs": lambda family: family.why_not_counted,
    "video": lambda family: family.why_no_clips,
}
EVERYWHERE = """\
- `restore` behind a method between the language model's layers: layers with fewer rows share no
  mask with the others.
- `restore:published`: it adds something else in each layer, and mlx-vlm's layers share a mask.
- A method between the language model's layers in batches, `serve` and folders of `prune-into`:
  layers with different numbers of rows share no mask. In a block of `pruned()` a prompt is read
  alone.

`pact` merges tokens, and a merged token gets as much attention as its members; `lookahead` raises
the attention to some tokens by a whole factor until they leave. mlx-vlm's layers share a mask, so
after the prompt the cache holds a merged token's row once for each member, and a raised one's as
often as the factor says. The answer is the same, but the cache is larger by those rows.
"""


def names_by_family() -> dict[Family, list[str]]:
    """What config.json calls the models of each family that works the same."""
    names: dict[Family, list[str]] = {}
    for name, family in FAMILIES.items():
        names.setdefault(family, []).append(name)
    return names


def refused_methods(family: Family) -> dict[str, str]:
    """The methods that cannot work in a family, with why; learned ones after the tower have a
    column of their own."""
    methods = (m for m in METHODS.values() if not m.learned or m.stage is Stage.DECODER)
    reasons = {
        method.name: why_not_in_family(family, Pruner(method.name, method)) for method in methods
    }
    return {name: why for name, why in reasons.items() if why}


def nowhere() -> dict[str, str]:
    """The methods that work in no family, with why, and the chains that have one of them."""
    first, *others = (refused_methods(family) for family in names_by_family())
    refused = {name: why for name, why in first.items() if all(name in each for each in others)}
    for name in PRESETS:
        if steps := [step.name for step in plan(name).steps if step.name in refused]:
            refused[name] = refused[steps[0]]
    return refused


def lines_of(refused: Mapping[str, str], start: str = "") -> list[str]:
    """Methods with the same reason, in a line each."""
    names: dict[str, list[str]] = {}
    for name, why in refused.items():
        names.setdefault(why, []).append(f"`{name}`")
    return [f"{start}{', '.join(quoted)}: {why}" for why, quoted in names.items()]


def limits_of(family: Family) -> list[str]:
    """What works only in part."""
    limits = [family.limits] if family.limits else []
    no_pool = SLOTS_OF_TILES if family.has_tiles else family.why_no_feature_gradient
    if no_pool and not family.why_not_learned:
        limits.append(f"`attention_pool` does not learn: {no_pool}")
    covered = {reason(family) for reason in COLUMNS.values()}
    covered.add(BETWEEN_LAYERS.format(family.why_no_decoder_methods))
    common, refused = nowhere(), refused_methods(family)
    more = {n: why for n, why in refused.items() if n not in common and why not in covered}
    limits += lines_of(more, "not ")
    return limits


def capitalized(sentence: str) -> str:
    """Its first letter is a capital, unless it begins with a name that has none."""
    is_name = sentence.startswith("mlx-vlm")
    return sentence if is_name else sentence[0].upper() + sentence[1:]


def page() -> str:
    """The page, in Markdown."""
    numbers: dict[str, int] = {}
    lines, limits = [], []
    for family, names in names_by_family().items():
        title = ", ".join(f"`{name}`" for name in names)
        reasons = [reason(family) for reason in COLUMNS.values()]
        cells = [
            "yes" if why is None else f"no {numbers.setdefault(why, len(numbers) + 1)}"
            for why in reasons
        ]
        lines.append([title, *cells])
        limits += [f"- {title}: {limit}." for limit in limits_of(family)]
    table = markdown(["family", *COLUMNS], "l" * (1 + len(COLUMNS)), lines)
    listed = [f"{number}. {capitalized(why)}." for why, number in numbers.items()]
    unable = [f"- {line}." for line in lines_of(nowhere())]
    refused = [f"- `{kind}`: {why}." for kind, why in REFUSED.items()]
    parts = [
        INTRODUCTION, table, "\n## Reasons\n", *listed, "\n## Limits\n", *limits,
        "\n## In no family\n", *unable, EVERYWHERE, "## Refused\n", *refused,
    ]  # fmt: skip
    return "\n".join(parts) + "\n"
