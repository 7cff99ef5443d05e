"""A user's mistake in one sentence: what, where, and what is allowed."""

from typing import Any


class UserError(ValueError):
    """A mistake of the user's. Its sentence names Python's parameters; a command line prints it
    after `error:`, with its flags in their place, and exits with code 2."""


LONGEST_REASON = 400  # characters
LONGEST_VALUE = 120

# What is installed apart: by the name it is imported by, the extra that brings it.
EXTRAS = {
    "matplotlib": "plot", "mlx_lm": "mlx-lm", "mlx_vlm": "mlx-vlm", "pillow_heif": "heic",
    "pyarrow": "parquet", "torch": "torch", "yaml": "train", "fastapi": "serve",
    "pydantic": "serve", "uvicorn": "serve", "gradio": "app", "cv2": "mlx-vlm",
}  # fmt: skip


def missing_package(package: str, user: object = "this command") -> UserError:
    """The error of a package that `user` needs and that is not installed; how to get it."""
    install = f"pip install 'mlx-vlm-prune[{EXTRAS[package]}]'"
    return UserError(f"{user} needs {package}, which is not installed: {install}")


def reason(problem: BaseException) -> str:
    """The first line of what an exception of another library says, or else its name; as much of it
    as a sentence has room for, since a stranger may have written it."""
    line = (str(problem).strip() or type(problem).__name__).splitlines()[0]
    line = line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]}…"
    return "".join(c if c.isprintable() else " " for c in line)


def whole_reason(problem: BaseException) -> str:
    """All lines of it as one, as far as there is room."""
    line = " ".join((str(problem).strip() or type(problem).__name__).split())
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]}…"


def short(value: Any) -> str:
    """A value in a sentence: itself, or its type where that is long."""
    text = repr(value)
    return text if len(text) <= 40 and text.isprintable() else f"of type {type(value).__name__}"


def clipped(text: str) -> str:
    """A name from a stranger's file in a sentence, as much of it as there is room for."""
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"


def quoted(value: Any) -> str:
    """A value from there, the same."""
    return clipped(repr(value))


def check_text(text: Any, name: str = "prompt") -> None:
    """Raises UserError for what is no text."""
    if not isinstance(text, str):
        raise UserError(f"{name} is {short(text)}; it must be a str")


def is_unicode(text: str) -> bool:
    """Can a text be written? Half of a pair of surrogates, which JSON can hold, cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
