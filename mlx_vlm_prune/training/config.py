"""The settings of a training run: the keys of its YAML file, which flags override.

Keys are mlx-lm's where mlx-lm has them. Each stage has defaults of its own.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from ..checkpoints.adapters import DEFAULTS as ADAPTERS
from ..checkpoints.adapters import KINDS as ADAPTER_STAGES
from ..checkpoints.adapters import AdapterConfig
from ..checkpoints.command_line import either, suggestion
from ..checkpoints.errors import UserError, missing_package
from ..checkpoints.reading.paths import check_regular

STAGES = ("pretrain", "sft", "lora", "dora", "pruner", "twig")
OPTIMIZERS = ("adam", "adamw", "muon", "sgd", "adafactor")
REPORTERS = ("wandb", "swanlab")
LARGEST_CONFIG = 2**20  # bytes of a YAML file
FREEZABLE = ("tower", "projector", "language", "pruner")
# EfficientVLM's first stage; the others are the usual rates of their kind.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "pretrain": {"epochs": 4, "learning_rate": 4e-4, "batch_size": 16},
    "sft": {"epochs": 4, "learning_rate": 1e-5, "batch_size": 4},
    "lora": {"learning_rate": 1e-4},
    "dora": {"learning_rate": 1e-4},
    "pruner": {"learning_rate": 1e-3, "batch_size": 16},
    "twig": {"epochs": 1, "learning_rate": 1e-4},
}

KINDS = {
    bool: "true or false", dict: "keys and values", float: "a number", int: "a whole number",
    str: "a text", tuple: "a list of texts",
}  # fmt: skip
LEAST = {
    "batch_size": 1, "grad_accumulation_steps": 1, "max_seq_length": 1, "steps_per_report": 1,
    "steps_per_eval": 1, "save_every": 1, "twig_layer": 1, "twig_layers": 1, "iters": 1,
    "keep_tokens": 1, "num_layers": -1, "noise": 0, "language_layers": 1, "val_batches": -1,
    "seed": 0, "grad_clip": 0,
}  # fmt: skip

# The stages in which a key has an effect; the others take its default alone.
EFFECTIVE = {
    "unfreeze": ("pretrain", "sft", *ADAPTER_STAGES, "pruner"),
    "language_layers": ("pretrain", "sft", "pruner"), "noise": ("pretrain", "sft", "pruner"),
    "num_layers": ADAPTER_STAGES, "lora_parameters": ADAPTER_STAGES,
    "twig_layer": ("twig",), "twig_layers": ("twig",),
}  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run.

    `freeze` names parts that stay as they are although the stage would train them, `unfreeze` parts
    that learn although it would not. `epochs` counts passes over the data where `iters` is None.
    `adapter_path` is where adapters, and `output` where every other stage's model and the
    checkpoints of the run go. Adam and AdamW correct their first means, as published and as
    PyTorch does; `optimizer_config: {bias_correction: false}` leaves that out, which is MLX's and
    mlx-lm's default.
    """

    stage: str
    data: str
    model: str | None = None
    tower: str | None = None  # of a `model` that is a language model's weights alone
    tokenizer: str | None = None  # of these
    dtype: str = "auto"
    # What learns
    freeze: tuple[str, ...] = ()
    unfreeze: tuple[str, ...] = ()
    language_layers: int | None = None  # only so many of the last learn
    pruner: str = "none"
    keep_ratio: float | None = None
    keep_tokens: int | None = None
    reset_pruner: bool = False  # a learned one begins untrained
    noise: float = 1.0  # of a learned pruner's scores at first
    num_layers: int = 16
    lora_parameters: dict[str, Any] = field(default_factory=lambda: dict(ADAPTERS))
    twig_layer: int = 2
    twig_layers: int = 3
    # Data
    format: str = "auto"
    image_folder: str | None = None
    chat_template_config: dict[str, Any] = field(default_factory=dict)
    max_seq_length: int = 2048
    skip_bad: bool = False
    # Steps
    iters: int | None = None
    epochs: float | None = None
    batch_size: int = 4
    grad_accumulation_steps: int = 1
    grad_checkpoint: bool = False
    grad_clip: float = 1.0
    optimizer: str = "adamw"
    optimizer_config: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 1e-4
    lr_schedule: dict[str, Any] | None = None
    seed: int = 0
    # Reports and checkpoints
    steps_per_report: int = 10
    steps_per_eval: int = 200
    val_batches: int = 25
    save_every: int = 100
    output: str = "trained"
    adapter_path: str = "adapters"
    resume: bool = False
    report_to: str | None = None
    project_name: str | None = None

    def __post_init__(self) -> None:
        """Raise UserError for a value that no run can have."""
        for name, allowed in (("stage", STAGES), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be {either(allowed)}")
        for name, values, choices in (
            ("freeze", self.freeze, FREEZABLE),
            ("unfreeze", self.unfreeze, FREEZABLE),
            ("report_to", (self.report_to or "").replace(",", " ").split(), REPORTERS),
        ):
            for value in values:
                if value not in choices:
                    raise UserError(f"{name} names {value!r}; it may name {either(choices)}")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < float("inf"):
                raise UserError(f"{name} is {value}; it must be at least {least}")
        for name in ("learning_rate", "epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{name} is {value}; it must be above 0")
        self._check_pairs()

    def _check_pairs(self) -> None:
        """Raise UserError for keys that exclude each other, or that the stage lacks."""
        if self.iters is not None and self.epochs is not None:
            raise UserError("give iters or epochs, not both")
        if self.keep_ratio is not None and self.keep_tokens is not None:
            raise UserError("give keep_ratio or keep_tokens, not both")
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise UserError(f"keep_ratio is {self.keep_ratio}; it must be above 0 and at most 1")
        self._check_effects()
        if self.stage in ADAPTER_STAGES:
            self._check_adapters()
        if self.stage in ADAPTER_STAGES and self.tower:
            raise UserError(
                f"stage {self.stage} needs a whole model: with tower the projector is untrained,"
                " and adapters would fit nothing that is written; train stage pretrain first"
            )
        if self.tokenizer and not self.tower:
            raise UserError("tokenizer goes with tower: it is that of a language model alone")
        if self.stage == "pruner" and self.pruner == "none":
            raise UserError("stage pruner needs pruner, the learned method that it trains")
        if self.reset_pruner and (
            self.stage in (*ADAPTER_STAGES, "twig") or "pruner" in self.freeze
        ):
            raise UserError("reset_pruner needs a pruner that learns; here none does")
        if self.pruner == "none" and (self.keep_ratio or self.keep_tokens):
            name = "keep_ratio" if self.keep_ratio else "keep_tokens"
            raise UserError(f"{name} needs pruner, the method that keeps so many visual tokens")

    def _check_effects(self) -> None:
        """Raise UserError for a key of other stages that is not at its default."""
        for name, stages in EFFECTIVE.items():
            if self.stage not in stages and getattr(self, name) != _default(name):
                raise UserError(f"{name} has no effect in stage {self.stage}; leave it out")
        if self.pruner == "none" and self.noise != _default("noise"):
            raise UserError("noise needs pruner, the learned method whose scores it is added to")

    def _check_adapters(self) -> None:
        """Raise UserError for adapters that cannot be, or for other parts than may learn along."""
        _ = self.adapters
        if "language" in self.freeze:
            raise UserError(f"freeze names language, in which adapters learn in stage {self.stage}")
        if others := set(self.unfreeze) - {"projector"}:
            raise UserError(
                f"unfreeze names {min(others)}; beside adapters only the projector can learn"
            )

    @property
    def adapters(self) -> AdapterConfig:
        """Those of the stages lora and dora."""
        return AdapterConfig.of(self.stage, self.num_layers, self.lora_parameters)

    @property
    def adapter_settings(self) -> dict[str, Any]:
        """What adapter_config.json holds: mlx-lm's keys and all others of the run."""
        parameters = {"lora_parameters": self.adapters.lora_parameters}
        return {**asdict(self), "fine_tune_type": self.stage, **parameters}

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.adapter_path if self.stage in ADAPTER_STAGES else self.output)

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> "TrainConfig":
        """From keys and values, with the stage's defaults for the rest.

        Raises UserError for an unknown key, a missing one or a value of the wrong kind.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                near = suggestion(str(name), known)
                raise UserError(f"{where}: there is no key {name!r}; {near}")
        values = {name: value for name, value in values.items() if value is not None}
        needed = {"stage": either(STAGES), "data": "a file, or a folder with train and valid files"}
        for name, kinds in needed.items():
            if name not in values:
                raise UserError(f"{where}: {name} is missing: {kinds}")
        values = {name: _typed(where, name, value) for name, value in values.items()}
        if values["stage"] not in STAGES:
            raise UserError(f"{where}: stage is {values['stage']!r}; it must be {either(STAGES)}")
        defaults = dict(DEFAULTS[values["stage"]])
        if "iters" in values:
            defaults.pop("epochs", None)
        return cls(**{**defaults, **values})


def check_reset(config: TrainConfig, learned: Sequence[str]) -> None:
    """Raise UserError where `reset_pruner` has no learned method of the chain to reset."""
    if config.reset_pruner and not learned:
        raise UserError(f"reset_pruner: {config.pruner} has no weights that learn")


def _default(name: str) -> Any:
    """Of a key, in the stages that have none of their own."""
    value = next(field for field in fields(TrainConfig) if field.name == name)
    return value.default if value.default_factory is MISSING else value.default_factory()


def kind_of(name: str) -> type:
    """What a key holds: bool, int, float, str, tuple or dict."""
    kind = get_type_hints(TrainConfig)[name]
    if NoneType in get_args(kind):
        kind = next(k for k in get_args(kind) if k is not NoneType)
    return get_origin(kind) or kind


def _typed(where: str, name: str, value: Any) -> Any:
    """A value as the field takes it; YAML reads 1e-5 as a text. Raises UserError."""
    target = kind_of(name)
    if target is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        if isinstance(parts, list | tuple) and all(isinstance(part, str) for part in parts):
            return tuple(part.strip() for part in parts)
    elif target in (int, float):
        if not isinstance(value, bool) and isinstance(value, int | float | str):
            with suppress(ValueError, OverflowError):
                if float(value) == target(float(value)):
                    return target(float(value))
    elif isinstance(value, target):
        return value
    raise UserError(f"{where}: {name} is {value!r}; it must be {KINDS[target]}")


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a YAML file. Raises UserError where it cannot be read or holds something else."""
    try:
        import yaml
    except ImportError:
        raise missing_package("yaml", "a config file") from None
    check_regular(path, LARGEST_CONFIG)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not valid YAML ({' '.join(str(e).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold keys and values")
    return content
