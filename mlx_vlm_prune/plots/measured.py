"""Results of `sweep`, `evaluate` and `encode`, read and checked as far as figures need it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.errors import UserError
from ..checkpoints.reading.files import read_json
from ..evaluation.table import Row, label

READ = ("evaluate", "sweep", "encode")  # results of these commands; older ones do not name theirs
READ_IN_WORDS = "`sweep`, `evaluate` or `encode`"
QUARTER = 0.25  # of the tokens: the budget at which methods are compared


@dataclass(frozen=True)
class Measured:
    """A result: its rows, the first of which is full, and what they were measured with."""

    name: str  # of the file, without its ending
    content: Mapping[str, Any]

    @property
    def rows(self) -> Sequence[Row]:
        rows: Sequence[Row] = self.content["rows"]
        return rows

    @property
    def full(self) -> Row:
        return next(row for row in self.rows if row["pruner"] == "none")

    @property
    def pruned(self) -> list[Row]:
        return [row for row in self.rows if row["pruner"] != "none"]

    @property
    def quarter(self) -> int:
        """The budget in tokens that is nearest to a quarter."""
        budgets = {row["tokens"] for row in self.pruned}
        return min(budgets, key=lambda tokens: abs(tokens - QUARTER * self.full["of"]))

    @property
    def where(self) -> str:
        """The model and the machine, in a line."""
        machine, versions = self.content["machine"], self.content["versions"]
        device = "" if machine["device"] == "cpu" else f", {machine['device']}"
        return (
            f"{self.content['model']} on {machine['cpu']}, {machine['cores']} cores{device},"
            f" {machine['system']}, MLX {versions['mlx']}"
        )

    def is_of_same_model(self, other: "Measured") -> bool:
        """By the weights, or where a result does not tell them by the name; and the adapters."""
        names = ("model_key", "adapter_path")
        if not all("model_key" in one.content for one in (self, other)):
            names = ("model", "adapter_path")
        return all(self.content.get(name) == other.content.get(name) for name in names)

    def check(self) -> None:
        """Read what every figure needs. Raises KeyError, TypeError or StopIteration where it is
        missing."""
        if not self.full["of"] > 0 or not isinstance(self.where, str):
            raise TypeError("of")
        for row in self.rows:
            label(row), row["tokens"] + row["of"]


class Sweep(Measured):
    """A result of `sweep`."""

    def check(self) -> None:
        super().check()
        for row in self.rows:
            row["ms"]["first_token"]["median"] + row["ms"]["total"]["median"]
            row["agreement"]["overlap"] + row["agreement"]["same"] + row["cache_saved"]
            row["operations_saved"]
        for row in self.pruned:
            row["gain"]["first_token"]["p10"], row["gain"]["first_token"]["predicted"]


class Evaluation(Measured):
    """A result of `evaluate`."""

    @property
    def factor(self) -> float:
        """From a row's score to what an axis shows."""
        return 100 if self.content["unit"] == "%" else 1

    @property
    def score_name(self) -> str:
        """What an axis of scores is called."""
        unit = self.content["unit"]
        return "questions answered right, %" if unit == "%" else f"score, {unit}"

    @property
    def is_timed(self) -> bool:
        """Whether every row has the time to its first token."""
        return all("first_token_ms" in row for row in self.rows)

    def check(self) -> None:
        super().check()
        if not any("overall" in row for row in self.rows):
            raise UserError(f"{self.name}: its answers were not scored, so there is no figure")
        self.content["count"] + len(self.content["kinds"]) + self.factor
        for row in self.rows:
            row["overall"] + sum(row["accuracy"].values())
            row.get("first_token_ms", {"total": 0})["total"] + 0


class Encoding(Measured):
    """A result of `encode`."""

    def check(self) -> None:
        super().check()
        for row in self.rows:
            row["ms"] + row["cosine"] + row.get("same_text", 0) + row.get("accuracy", 0)
        self.content["images"] + self.content["batch_size"]


def case_key(row: Row) -> tuple[str, float]:
    """A row's method and budget, by which results of several files are joined."""
    return label(row), row.get("keep_ratio", row.get("keep_tokens", row["tokens"]))


def read_result(path: Path) -> Measured:
    """Raises UserError for a file that is no result, or one without a pruned row."""
    content = read_json(path, most=None)
    if (command := content.get("command", READ[0])) not in READ:
        raise UserError(f"{path} is a result of `{command}`; plot reads those of {READ_IN_WORDS}")
    try:
        result = _kind_of(content)(path.stem, content)
        result.check()
        has_pruned = bool(result.pruned)
    except StopIteration:
        raise _no_result(path, "no row has all visual tokens") from None
    except KeyError as missing:
        raise _no_result(path, f"there is no {missing.args[0]}") from None
    except (TypeError, AttributeError, LookupError):
        raise _no_result(path, "a value is of another kind") from None
    if not has_pruned:
        raise UserError(f"{path} has all visual tokens only, and nothing to compare with them")
    return result


def _no_result(path: Path, why: str) -> UserError:
    return UserError(f"{path} is no result of {READ_IN_WORDS}: {why}")


def _kind_of(content: Mapping[str, Any]) -> type[Measured]:
    if content.get("command") == "sweep":
        return Sweep
    return Encoding if "cosine" in content["rows"][0] else Evaluation
