"""Train a model, a pruner, adapters or a twig on your own pictures.

python -m mlx_vlm_prune.train --stage sft --data train.jsonl --output trained
python -m mlx_vlm_prune.train -c config.yaml --learning-rate 1e-5
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
        config = config_of(parser.parse_args(argv))
        from .training.run import train  # imports mlx

        train(config)


if __name__ == "__main__":
    main()
