"""What stage `pruner` leaves of a model of mlx-vlm's: its folder, linked, and the pruner's weights.

mlx-vlm would read every .safetensors as the model's, so an index names those that are.
"""

from collections.abc import Mapping
from pathlib import Path

from ..checkpoints.checkpoint import LEARNED_FILE
from ..checkpoints.reading.files import optional_json, read_header, write_json
from ..checkpoints.reading.tensors import RawTensor
from ..checkpoints.reading.weights import INDEX
from ..checkpoints.writing import write_learned
from ..hosts.linked_folder import link_or_copy, mlx_vlm_weight_files
from .curve import NAME as CURVE
from .metrics import FILE as METRICS
from .run_folder import LOCK, RUN
from .run_state import FOLDER as CHECKPOINTS
from .trained_folder import assembled

OF_A_RUN = (RUN, LOCK, METRICS, CHECKPOINTS, f"{CURVE}.png", f"{CURVE}.svg")


def write_linked(source: Path, learned: Mapping[str, RawTensor], folder: Path) -> None:
    """Write the model in `source` to FOLDER, beside what a run has there, with the weights
    `learned`, as METHOD.parameter, and those of other methods in `source`.

    Raises UserError where it cannot be written; what was there then stays.
    """
    files, before = mlx_vlm_weight_files(source), source / LEARNED_FILE
    names = {name: file.name for file in files for name in read_header(file)[0]}
    with assembled(folder) as ready:
        ready.mkdir()
        link_or_copy(source, ready, [*OF_A_RUN, INDEX, LEARNED_FILE])
        write_json(ready / INDEX, optional_json(source / INDEX) | {"weight_map": names})
        write_learned(learned, before if before.exists() else None, ready / LEARNED_FILE)
