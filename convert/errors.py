"""What a user did wrong, in one sentence: what, where, and what is allowed."""

import argparse
from typing import NoReturn


class UserError(ValueError):
    """A mistake of the user's. Command lines print it after `error:` and exit with code 2."""


class Parser(argparse.ArgumentParser):
    """A command line that refuses in one sentence, too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help lists what there is)\n")
