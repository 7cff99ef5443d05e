"""Train a model, a pruner, adapters or a twig on your own pictures.

mlx-vlm-prune train --stage sft --data train.jsonl --output trained
mlx-vlm-prune train -c config.yaml --learning-rate 1e-5
mlx-vlm-prune train --stage pruner --pruner ./my_method.py --keep-ratio 0.25 --data data
"""

from collections.abc import Sequence

from .checkpoints.command_line import Parser, in_one_sentence
from .training.options import add_options, config_of

DESCRIPTION = (
    "Train on your own pictures. Flags override the keys of the config file. Ctrl-C writes a"
    " checkpoint; --resume goes on from it."
)


def build_parser() -> Parser:
    """The command line of `train`."""
    parser = Parser("mlx_vlm_prune.train", description=DESCRIPTION)
    add_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    parser = build_parser()
    with in_one_sentence(parser):
        args = parser.parse_args(argv)
        if args.pruner:  # a config file, which may be a stranger's, names no file that is run
            from .pruners.own_methods import register_files  # imports mlx, as what follows

            args.pruner = register_files(args.pruner)
        config = config_of(args)
        from .training.run import train

        train(config)


if __name__ == "__main__":
    main()
