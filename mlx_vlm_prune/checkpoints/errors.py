"""A user's mistake in one sentence: what, where, and what is allowed."""


class UserError(ValueError):
    """A mistake of the user's. Its sentence names Python's parameters; a command line prints it
    after `error:`, with its flags in their place, and exits with code 2."""


# What is installed apart: by the name it is imported by, the extra that brings it.
EXTRAS = {
    "matplotlib": "plot", "mlx_lm": "mlx-lm", "mlx_vlm": "mlx-vlm", "pyarrow": "parquet",
    "torch": "torch", "yaml": "train",
}  # fmt: skip


def missing_package(package: str, user: object = "this command") -> UserError:
    """The error of a package that `user` needs and that is not installed; how to get it."""
    install = f"pip install 'mlx_vlm_prune[{EXTRAS[package]}]'"
    return UserError(f"{user} needs {package}, which is not installed: {install}")


def reason(problem: BaseException) -> str:
    """The first line of what an exception of another library says, or else its name."""
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]
