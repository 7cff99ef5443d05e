"""What a training run is told: the keys of its YAML file, which flags override.

Keys are mlx-lm's where mlx-lm has them. Each stage has defaults of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ..checkpoints.command_line import either, suggestion
from ..checkpoints.errors import UserError, missing_package

STAGES = ("pretrain", "sft", "lora", "dora", "pruner", "twig")
OPTIMIZERS = ("adam", "adamw", "muon", "sgd", "adafactor")
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


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run.

    `freeze` names parts that stay as they are although the stage would train them. `epochs` counts
    passes over the data where `iters` is None. `adapter_path` is where adapters, and `output` where
    every other stage's model and the checkpoints of the run go.
    """

    stage: str
    data: str
    model: str | None = None
    dtype: str = "auto"
    # What learns
    freeze: tuple[str, ...] = ()
    pruner: str = "none"
    keep_ratio: float | None = None
    keep_tokens: int | None = None
    num_layers: int = 16
    lora_parameters: dict[str, Any] = field(
        default_factory=lambda: {"rank": 8, "scale": 20.0, "dropout": 0.0}
    )
    train_projector: bool = False  # beside the adapters
    twig_layer: int = 2
    twig_layers: int = 3
    # Data
    format: str = "auto"
    image_folder: str | None = None
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
        for part in self.freeze:
            if part not in FREEZABLE:
                raise UserError(f"freeze names {part!r}; it may name {either(FREEZABLE)}")
        for name in (
            "batch_size", "grad_accumulation_steps", "max_seq_length", "steps_per_report",
            "steps_per_eval", "save_every", "twig_layers",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.learning_rate < float("inf"):
            raise UserError(f"learning_rate is {self.learning_rate}; it must be above 0")

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.adapter_path if self.stage in ("lora", "dora") else self.output)

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> "TrainConfig":
        """From keys and values, with the stage's defaults for the rest.

        Raises UserError for an unknown key, a missing one or a value of the wrong kind.
        """
        kinds = get_type_hints(cls)
        for name in values:
            if name not in kinds:
                raise UserError(f"{where}: there is no key {name!r}; {suggestion(name, kinds)}")
        for name in ("stage", "data"):
            if values.get(name) is None:
                raise UserError(f"{where}: {name} is missing")
        stage = values["stage"]
        if stage not in STAGES:
            raise UserError(f"{where}: stage is {stage!r}; it must be {either(STAGES)}")
        merged = {**DEFAULTS[stage], **{k: v for k, v in values.items() if v is not None}}
        if merged.get("iters"):
            merged.pop("epochs", None)
        return cls(**{name: _typed(where, name, value, kinds) for name, value in merged.items()})


def _typed(where: str, name: str, value: Any, kinds: Mapping[str, Any]) -> Any:
    """A value as the field takes it; YAML reads 1e-5 as a text. Raises UserError."""
    kind = next(k for k in (*get_args(kinds[name]), kinds[name]) if k is not type(None))
    target = get_origin(kinds[name]) if get_origin(kinds[name]) in (tuple, dict) else kind
    if target is tuple:
        return tuple([value] if isinstance(value, str) else value)
    target = get_origin(target) or target
    is_number = target in (int, float) and isinstance(value, int | float | str)
    if not isinstance(value, bool) and is_number:
        try:
            if float(value) == target(value):
                return target(value)
        except ValueError:
            pass
    elif isinstance(value, target):
        return value
    raise UserError(f"{where}: {name} is {value!r}; it must be of type {target.__name__}")


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a YAML file. Raises UserError where it cannot be read or holds something else."""
    try:
        import yaml
    except ImportError:
        raise missing_package("yaml", "a config file") from None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not valid YAML ({' '.join(str(e).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold keys and values")
    return content
