"""Every method in one table, one file each. Add methods here, and the twin in torch_ref/pruners.

A new method is one file with `stage`, `needs` (the signals beside the tokens, if any) and
`prune(signals, K, *, options)`, its twin in torch_ref, and its name in `NAMES`. Between a
tower's layers it also has `cuts`, between the language model's `schedule`, which say where how
many tokens stay; what else a file may hold is in `method.py`. A method that lies elsewhere gets
its name by `register_pruner`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from ..checkpoints.command_line import either
from ..checkpoints.errors import UserError, reason
from .contract import Reduction, Signals, Stage
from .method import Method
from .pipeline import Pipeline, Pruner, StepBudgets
from .spec import AUTO, parse, unknown_pruner

GROUP = "mlx_vlm_prune.pruners"  # of the entry points by which packages bring methods in
# In the order in which they are listed.
NAMES = """
    none random uniform avgpool downsample tome patch_norm kq_norm pixelprune docprune ipcv
    illava_tower illava_decoder flowcut window_merge
    norm similarity received_attention cls_attention visionzip vispruner prumerge prumerge_plus
    hiprune prunesid holov global_local divprune two_scales salience_coverage zoo_prune cdpruner
    scope mmtok apet fastv pyramiddrop sparsevlm dual_attention lookahead dart v2drop vtw pact
    ivc_prune attention_pool score_prune mlp learn_prune twig evs vidcom2 flashvid restore ivc
""".split()
METHODS = {name: Method.of(import_module(f".{name}", __name__)) for name in NAMES}
# Chains with a name. DUET-VLM merges like VisionZip, then drops inside the decoder at half
# depth and later; VScan selects and merges in the tower, then drops at half depth; iLLaVA keeps the
# most attended in both, and takes what the others say into few of those. MustDrop merges in the
# tower, and drops in the decoder what neither words nor tower attend to. Hi-Lo Prune lets the first
# layers read what pixels alone would keep.
PRESETS = {
    "duet": "visionzip+pyramiddrop:start=0.5,stages=2",
    "vscan": "global_local+fastv:layer=0.5",
    "illava": "illava_tower+illava_decoder",
    "mustdrop": "window_merge+dual_attention",
    "hilo": "two_scales+lookahead",
}

__all__ = [
    "AUTO", "METHODS", "PRESETS", "Method", "Pipeline", "Pruner", "Reduction", "Signals", "Stage",
    "StepBudgets", "check_names", "plan", "register_pruner", "resolve",
]  # fmt: skip


def plan(spec: "str | Pruner | Pipeline", learned: Mapping[str, Any] | None = None) -> Pipeline:
    """The methods that "NAME", "NAME:option=value,…" or "NAME+NAME" names.

    `learned` holds the weights that the checkpoint has of learned methods, by name.
    Raises UserError for an unknown name or option, or methods that do not chain.
    """
    if isinstance(spec, str):
        _register_installed(spec)
        return parse(spec, METHODS, PRESETS, learned or {})
    if not isinstance(spec, Pruner | Pipeline):
        raise UserError(f"pruner is {spec!r}; it must be a name, such as 'divprune'")
    return Pipeline.of(spec)


def check_names(specs: Iterable[str]) -> None:
    """Raises UserError for an unknown method or preset, without a checkpoint: what a learned one
    needs is checked by `plan`."""
    for spec in specs:
        for name in _register_installed(spec):
            if name not in METHODS and name not in PRESETS and spec != AUTO:
                raise unknown_pruner(name, [*METHODS, *PRESETS])


def _register_installed(spec: str) -> list[str]:
    """The names in a specification; methods of installed packages among them are in the table."""
    names = [part.partition(":")[0] for part in spec.split("+")]
    register_installed(names)
    return names


def resolve(spec: "str | Pruner", learned: Mapping[str, Any] | None = None) -> Pruner:
    """The one method that a specification names. Raises UserError for a chain, and as `plan`."""
    if isinstance(spec, Pruner):
        return spec
    first, *others = plan(spec, learned).steps
    if others:
        raise UserError(f"{spec} is a chain; one method is asked for")
    return first


def register_pruner(method: ModuleType | Method) -> None:
    """Add a method of your own to the table, for this process.

    `method` is a module with `stage` and `prune(signals, K, *, options)`, or a `Method`. A module
    is called by its name: `generate(pruner="my_method:option=3")` understands it, as `plan`,
    `evaluate` and the listing do. Raises UserError for a name that is taken, a function that
    the stage needs and that is missing or takes other arguments, or an unknown signal.
    """
    if isinstance(method, ModuleType):
        method = Method.of(method)
    if not isinstance(method, Method):
        raise UserError(f"{method!r} is neither a module nor a Method")
    if method.name in METHODS or method.name in PRESETS or method.name == AUTO:
        raise UserError(f"a pruner is called {method.name} already; choose another name")
    if not method.name.isidentifier():
        raise UserError(f"{method.name!r} cannot name a pruner; use letters, digits and _")
    method.check()
    place = _place(method)
    signals = {name for other in METHODS.values() if _place(other) == place for name in other.needs}
    for signal in method.needs:
        if signal not in signals:
            raise UserError(
                f"{method.name} needs {signal!r}; {place} has {either(sorted(signals))}"
            )
    METHODS[method.name] = method


def _place(method: Method) -> str:
    """Where a method gets its signals."""
    if method.stage is Stage.ENHANCER:
        return "an enhancer"
    return "a decoder" if method.stage is Stage.DECODER else "a tower"


def register_installed(names: Iterable[str] | None = None) -> list[str]:
    """Put methods of installed packages into the table: those of these names, or all.

    A package brings them in by entry points of the group `mlx_vlm_prune.pruners`: a name, and the
    module (or `Method`) that has it. Raises UserError for one of `names` whose module fails or is
    no method; of all, the sentences on those are returned, and they are left out.
    """
    problems: list[str] = []
    known = METHODS.keys() | PRESETS.keys()
    wanted = None if names is None else set(names) - known
    points = entry_points(group=GROUP) if wanted is None or wanted else ()
    for point in points:
        if point.name in known or (wanted is not None and point.name not in wanted):
            continue
        try:
            _register_entry_point(point)
        except UserError as problem:
            if wanted is not None:
                raise
            problems.append(str(problem))
    return problems


def _register_entry_point(point: EntryPoint) -> None:
    try:
        method = point.load()
    except Exception as problem:
        kind = type(problem).__name__
        raise UserError(
            f"the pruner {point.name} of {point.value} fails: {kind}: {reason(problem)}"
        ) from problem
    method = method if isinstance(method, Method) else Method.of(method)
    register_pruner(replace(method, name=point.name))
