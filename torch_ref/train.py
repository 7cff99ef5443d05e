"""Train on your own pictures in PyTorch, on CUDA, MPS or a CPU: MLX's command and config file.

python -m torch_ref.train --stage sft --data train.jsonl --output trained
python -m torch_ref.train -c config.yaml --learning-rate 1e-5

Either framework loads what the other wrote, and goes on from its checkpoints.
"""

from collections.abc import Sequence

from mlx_vlm_prune.checkpoints.command_line import Parser, in_one_sentence
from mlx_vlm_prune.training.options import add_options, config_of

DESCRIPTION = (
    "Train on your own pictures in PyTorch. Flags override the keys of the config file, which is"
    " mlx_vlm_prune.train's. Ctrl-C writes a checkpoint; --resume goes on from it."
)


def build_parser() -> Parser:
    """The command line."""
    parser = Parser("torch_ref.train", description=DESCRIPTION)
    add_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    parser = build_parser()
    with in_one_sentence(parser):
        args = parser.parse_args(argv)
        if args.pruner:
            from .pruners.own_twins import register_twins  # here, since torch may be missing

            args.pruner = register_twins(args.pruner)
        config = config_of(args)
        from .training.run import train

        train(config)


if __name__ == "__main__":
    main()
