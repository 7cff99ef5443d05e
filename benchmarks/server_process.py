"""A server in a process of its own, which a block starts and ends."""

import re
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mlx_vlm_prune.checkpoints.errors import UserError

ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+\S*")


@contextmanager
def server_process(words: Sequence[str]) -> Iterator[tuple[int, str]]:
    """The id of a command's process, and the address on the loopback that it writes to stderr,
    perhaps behind warnings. Raises UserError where the command ends before."""
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line, address = "", None
            while not address and (following := process.stderr.readline()):
                line, address = following, ADDRESS.search(following)
            if not address:
                raise UserError(f"the server did not start: {line.strip()}")
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield process.pid, address[0]
        finally:
            process.terminate()
