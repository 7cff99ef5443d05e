"""What a method's file may define, with the default of each.

Shapes: N visual tokens, K kept.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from types import ModuleType
from typing import Any, get_args, get_type_hints

from ..checkpoints.command_line import either
from ..checkpoints.errors import UserError
from .contract import Policy, Stage

# Signals that depend on the prompt.
PROMPT_SIGNALS = {
    "text", "last_attention", "next_attention", "text_attention", "twig_attention", "held_keys",
    "held_values",
}  # fmt: skip
# Options of any method: what it leaves in a chain; a budget for each image, and its reference.
CHAIN_OPTIONS = ("keep", "budget", "reference")
# A paragraph "As the authors' code (github.com/OWNER/NAME@COMMIT) …. Differs: …; …": COMMIT is that
# of the code whose results the tests hold.
AUTHORS_CODE = re.compile(r"([\w.-]+/[\w.-]+@[0-9a-f]{7})\b")
# What each stage calls, with the arguments before the options.
FUNCTIONS = {
    "prune": ("signals", "K"),  # the Reduction
    "cuts": ("layers", "N", "K"),  # of a tower: [(layer, "before" or "middle", tokens left)]
    # Of a tower, for the method's place in a chain: how many of N tokens it leaves, where K are
    # left at the end of the chain.
    "leaves": ("N", "K"),
    # Of a tower: the layers that attend to the tokens that left, too; and what they are there, and
    # at the tower's end where another method follows: a function of the kept tokens (B, K, D) as
    # they are then, to all, (B, N, D).
    "attends_to_all": ("layers",),
    "give_back": ("signals", "kept"),
    # Of a tower, at each of the cuts: scores of all layers so far, (B, N); and, where `adapts` says
    # so, how many of one image's tokens stay, with so many layers till the last cut.
    "accumulate": ("signals",),
    "adapts": (),
    "left": ("signals", "K", "remaining"),
    "schedule": ("layers", "N", "K"),  # of a language model: {layer: tokens left}
    "probe": ("project", "features_BND"),  # of the projector: the signal `sensitivity_BN`
    # Of a language model: the logs of whole numbers, added to the attention till its cut.
    "entry_bias": ("signals", "K"),
    "attention_bias": ("signals", "kept"),  # of an enhancer: added to the attention, (B, K)
    "selected": ("K",),  # of an enhancer: how many of K slots the last selector chooses
    "complete": ("signals", "kept", "K"),  # of an enhancer: all K slots, where those are fewer
    # Of an enhancer: does it add other things while prompts are read, and nothing later?
    "calibrates": (),
    "prompt_bias": ("signals", "kept"),  # then, in place of `attention_bias`
    "calibration": ("N", "K", "positions"),  # then, beside it: see `models.pruning.calibrated`
    "own_budget": ("weights", "N"),  # K, where the options say it; else None
    # Of a learned method, in training. A method whose `prune` has gradients needs none of them.
    "training_factor": ("weights", "signals", "K", "noise"),  # on the attention of tokens, (B, N)
    # Beside the answers' loss, a mean over images.
    "training_loss": ("weights", "signals", "gradient_BN"),
    "training_budget": ("K", "step"),  # how many tokens a step keeps
}
REQUIRED = {
    Stage.ENCODER: ("cuts", "prune"), Stage.FEATURES: ("prune",), Stage.PROJECTED: ("prune",),
    Stage.DECODER: ("schedule", "prune"), Stage.ENHANCER: (),
}  # fmt: skip


def _no_weights(dims: int, tokens: int) -> Any:
    raise AssertionError("the method has no weights")


def _no_fixed_options(weights: Any) -> Mapping[str, Any]:
    return {}


def _any_budget(weights: Any) -> int | None:
    return None


def _same_budget(K: int, step: int) -> int:
    return K


def _all_slots(K: int) -> int:
    return K


def _never() -> bool:
    return False


def _no_layers(layers: int) -> range:
    return range(0)


@dataclass(frozen=True)
class Method:
    """What a method's file holds, by the names it has there; keyword-only parameters of its
    functions are its options.

    A learned method may leave `prune` to its weights: the class that `make_weights` returns.

    The answers' loss trains a learned method through the gradients of its `prune`. One that chooses
    tokens has none: its `training_factor` is 1 for tokens that stay and next to 0 for others, with
    the gradients that the choice would have if it were soft. `training_loss` is what else it
    learns: `gradient_BN` is the derivative of the full model's loss by the log of the attention
    that each token gets.
    """

    name: str
    doc: str
    stage: Stage
    needs: Mapping[str, str | None] = field(default_factory=dict)  # signal: option of its layer
    prune: Callable[..., Any] | None = None
    positions: Policy = "keep"  # the paper's
    proportional: bool = False  # does a merged token count as often as it has members?
    reads_frames: bool = False  # does it know a clip's frames apart?
    cuts: Callable[..., Any] | None = None
    leaves: Callable[..., int] | None = None
    attends_to_all: Callable[..., range] = _no_layers
    give_back: Callable[..., Any] | None = None
    accumulate: Callable[..., Any] | None = None
    adapts: Callable[..., bool] = _never
    left: Callable[..., int] | None = None
    schedule: Callable[..., Any] | None = None
    probe: Callable[..., Any] | None = None
    entry_bias: Callable[..., Any] | None = None
    attention_bias: Callable[..., Any] | None = None
    selected: Callable[..., int] = _all_slots
    complete: Callable[..., Any] | None = None
    calibrates: Callable[..., bool] = _never
    prompt_bias: Callable[..., Any] | None = None
    calibration: Callable[..., Any] | None = None
    own_budget: Callable[..., int | None] | None = None
    learned: bool = False  # does it come with weights?
    make_weights: Callable[..., Any] = _no_weights  # (dims, tokens): untrained ones
    fixed_options: Callable[[Any], Mapping[str, Any]] = _no_fixed_options  # set by training
    trained_tokens: Callable[[Any], int | None] = _any_budget  # the one K that weights allow
    training_factor: Callable[..., Any] | None = None
    training_loss: Callable[..., Any] | None = None
    training_budget: Callable[[int, int], int] = _same_budget

    @classmethod
    def of(cls, module: ModuleType) -> "Method":
        """The method of a file. Raises UserError where it has no `stage`."""
        name, doc = module.__name__.rpartition(".")[2], inspect.getdoc(module) or ""
        if "stage" not in vars(module):
            raise UserError(f"{name} has no stage; a method says where it works: stage = Stage.…")
        names = {f.name for f in fields(cls)}
        declared = {name: value for name, value in vars(module).items() if name in names}
        learned = {"learned": declared.get("learned", "make_weights" in declared)}
        return cls(**declared | learned | {"name": name, "doc": doc})

    @property
    def has_trained_slots(self) -> bool:
        """Does it make a number of slots for which its weights were trained?"""
        return self.trained_tokens is not _any_budget

    @property
    def summary(self) -> str:
        """The docstring's first sentences, on one line."""
        return " ".join(self.doc.split("\n\n")[0].split())

    @property
    def authors_code(self) -> str:
        """OWNER/NAME@COMMIT of the authors' code that was run beside this, empty for none."""
        named = AUTHORS_CODE.search(self.doc)
        return named[1] if named else ""

    @property
    def fidelity(self) -> tuple[str, list[str]]:
        """In what this is as its authors' code, and each difference; empty where none was run."""
        paragraphs = (" ".join(p.split()) for p in self.doc.split("\n\n"))
        text = next((p for p in paragraphs if AUTHORS_CODE.search(p)), "")
        alike, _, differences = text.replace("github.com/", "").partition(" Differs: ")
        return alike, differences.removesuffix(".").split("; ") if differences else []

    @property
    def description(self) -> str:
        """The docstring without its lists of options and shapes."""
        parts = self.doc.split("\n\n")
        return "\n\n".join(p for p in parts if not p.startswith(("Options:", "Shapes:")))

    @property
    def option_help(self) -> dict[str, str]:
        """What options mean, as the docstring says it in lines `name: meaning` under `Options:`."""
        sections = (p for p in self.doc.split("\n\n") if p.startswith("Options:\n"))
        lines = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", next(sections, ""), re.M)
        return {name: " ".join(text.split()) for name, text in lines}

    @property
    def source(self) -> str:
        """An arXiv number, a repository or a conference's page, empty for a baseline."""
        places = r"arXiv:\d{4}\.\d{4,5}|github\.com/[\w.-]+/[\w-]+|cvpr\.thecvf\.com/[\w/-]+"
        named = re.search(places, self.doc)
        return named[0] if named else ""

    @property
    def reads_prompt(self) -> bool:
        """Does the prompt decide what stays?"""
        return bool(PROMPT_SIGNALS & set(self.needs))

    @property
    def chooser(self) -> Callable[..., Any] | None:
        """`prune`, or that of a learned method's weights."""
        if self.prune is None and self.make_weights is not _no_weights:
            return getattr(get_type_hints(self.make_weights).get("return"), "prune", None)
        return self.prune

    @cached_property
    def options(self) -> dict[str, Any]:
        """Names of the options, with their defaults."""
        optional = (self.cuts, self.leaves, self.give_back, self.schedule, self.chooser, self.probe)
        biases = (self.attention_bias, self.entry_bias)
        functions = [*optional, *biases, self.attends_to_all, self.selected, self.calibrates]
        functions += [getattr(self, name) for name in FUNCTIONS if name != "prune"]
        return {
            parameter.name: parameter.default
            for function in functions
            if function
            for parameter in inspect.signature(function).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY
        }

    def check(self) -> None:
        """Raise UserError where a name is missing, or is not what its stage calls for."""
        if self.stage not in REQUIRED:
            stages = either(f"Stage.{stage.name}" for stage in REQUIRED)
            raise UserError(f"{self.name}: stage is {self.stage!r}; it must be {stages}")
        if self.positions not in get_args(Policy):
            raise UserError(f"{self.name}: positions is not {either(map(repr, get_args(Policy)))}")
        if not isinstance(self.needs, Mapping):
            raise UserError(f"{self.name}: needs is no dict of signals and their layers' options")
        for name, arguments in FUNCTIONS.items():
            function = self.chooser if name == "prune" else getattr(self, name)
            if function is not None:
                _check_signature(f"{self.name}: {name}", function, arguments)
            elif name in REQUIRED[self.stage]:
                raise UserError(
                    f"{self.name} has no {name}({', '.join(arguments)}), which a method of stage"
                    f" {self.stage.name.lower()} must have"
                )
        if "sensitivity" in self.needs and not (self.probe and self.stage is Stage.PROJECTED):
            raise UserError(f"{self.name} needs 'sensitivity', so it has a probe, and is projected")
        if self.adapts is not _never and not self.left:
            raise UserError(f"{self.name} has adapts(), and no left(signals, K, remaining)")
        if self.attends_to_all is not _no_layers and not self.give_back:
            raise UserError(f"{self.name} has attends_to_all, and no give_back(signals, kept)")
        if self.stage is Stage.ENHANCER and not (self.attention_bias or self.complete):
            raise UserError(
                f"{self.name} has neither attention_bias(signals, kept) nor complete(signals, kept,"
                " K), of which an enhancer must have one"
            )
        for signal, option in self.needs.items():
            if option not in (None, *self.options):
                raise UserError(f"{self.name}: {signal} is of layer {option!r}, which is no option")


def _check_signature(name: str, function: Any, arguments: Sequence[str]) -> None:
    """Raise UserError unless a function takes these arguments and, after `*`, only options."""
    if not callable(function):
        raise UserError(f"{name} is {function!r}, not a function")
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    options = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    taken = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    if len(taken) != len(arguments) or len(taken) + len(options) != len(parameters):
        raise UserError(
            f"{name} takes ({', '.join(p.name for p in parameters)}); it must take"
            f" ({', '.join(arguments)}) and, as keyword-only parameters, its options"
        )
    for option in options:
        is_plain = isinstance(option.default, bool | int | float | str)
        if option.name in CHAIN_OPTIONS or not is_plain:
            raise UserError(
                f"{name}: option {option.name} must have a default that is a bool, int, float or"
                f" str, and another name than {either(CHAIN_OPTIONS)}"
            )
