"""Write the two files of a pruning method of your own, which run as they are.

mlx-vlm-prune new-method my_method --out methods

methods/my_method.py is the method in MLX, methods/my_method_torch.py its twin in PyTorch, written
independently: `python -m torch_ref.verify` compares both on a model.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from string import Template

from .checkpoints.command_line import SCRIPT, Parser, in_one_sentence
from .checkpoints.errors import UserError
from .checkpoints.reading.files import check_target, write_atomically
from .pruners import METHODS, PRESETS
from .pruners.own_methods import SIGNS

EPILOG = "example: mlx-vlm-prune new-method my_method --out methods"
METHOD = Template('''"""Keep the tokens that are farthest from the image's mean token.

Say here how the method chooses, in the words of its paper, and name the source: arXiv:NNNN.NNNNN.
The first sentence stands in tables.

Options:
    power: exponent of a token's distance to the mean

Shapes: B images, N tokens, K kept, D features.
"""

import mlx.core as mx

from mlx_vlm_prune import Reduction, Signals, Stage
from mlx_vlm_prune.pruners.numerics import choosing, constant, keep_highest, to_choice_dtype

stage = Stage.FEATURES  # at the end of the tower; PROJECTED is after the projector
needs: dict[str, str | None] = {}  # signals beside the tokens: {"cls_attention": "layer"}


def prune(signals: Signals, K: int, *, power: float = 1.0) -> Reduction:
    """Keep K of N tokens; keyword-only parameters are the options."""
    with choosing():  # float64 on a CPU, float32 on a GPU
        x_BND = to_choice_dtype(signals.x_BND)
        apart_BND = x_BND - x_BND.mean(axis=1, keepdims=True)
        distance_BN = mx.sqrt(mx.square(apart_BND).sum(axis=-1))
        return Reduction(index_BK=keep_highest(mx.power(distance_BN, constant(power)), K))
''')
TWIN = Template('''"""$name in PyTorch, written from its formula, as a check of $name.py.

Shapes: B images, N tokens, K kept, D features.
"""

from torch_ref.pruners.contract import Reduction, Signals, index_reduction
from torch_ref.pruners.numerics import highest

stage = "features"


def prune(signals: Signals, K: int, *, power: float = 1.0) -> Reduction:
    kept = []
    for x_ND in signals.x_BND.double():
        distance_N = (x_ND - x_ND.mean(dim=0)).norm(dim=1)
        kept.append(sorted(highest(distance_N**power, K)))
    return index_reduction(signals, kept)
''')


def build_parser() -> Parser:
    """The command line of `new-method`."""
    parser = Parser(
        "mlx_vlm_prune.new_method",
        description="Write the two files of a new method. They run as they are; change them.",
        epilog=EPILOG,
    )
    parser.add_argument("name", help="name of the method: letters, digits and _")
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="FOLDER", help="folder of the files"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    parser = build_parser()
    with in_one_sentence(parser):
        args = parser.parse_args(argv)
        write_method(args.name, args.out)


def write_method(name: str, folder: Path) -> None:
    """Write NAME.py and NAME_torch.py, and print what to do next. Raises UserError."""
    if not name.isidentifier():
        raise UserError(f"{name!r} cannot name a pruner; use letters, digits and _")
    if name in METHODS or name in PRESETS:
        raise UserError(f"a pruner is called {name} already; choose another name")
    if signs := set(str(folder.resolve())) & set(SIGNS):
        raise UserError(f"{folder} has {' and '.join(sorted(signs))} in it, which a chain has, too")
    files = {folder / f"{name}.py": METHOD, folder / f"{name}_torch.py": TWIN}
    for path in files:
        check_target(path, replace=False)
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        write_atomically(path, text.substitute(name=name))
    method, twin = files
    print(f"Wrote {method} and its twin {twin}. Next:")
    print(f"  {SCRIPT} generate --pruner {_place(method)} --keep-ratio 0.25 --overlay kept.png")
    print(f"  {SCRIPT} evaluate --pruner random {_place(method)} --keep-ratio 0.25 --per-kind 20")
    print(f"  python -m torch_ref.verify --pruner {_place(method)}  # needs torch")


def _place(path: Path) -> str:
    """A path that no one takes for a method's name."""
    return shlex.quote(str(path) if path.parent != Path() else f"./{path}")


if __name__ == "__main__":
    main()
