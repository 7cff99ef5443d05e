"""Answer a question about a picture with all its visual tokens, and with a quarter of them.

python examples/answer_pruned.py
python examples/answer_pruned.py photo.jpg "What is this?" mlx-community/Qwen2.5-VL-3B-Instruct-4bit

Without arguments: the built-in model, about a scene that is drawn here.
"""

import sys

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.scenes import compose


def main(image=None, question="What does the sign say?", model_name=None):
    model, processor = load(model_name)  # None is the built-in model
    image = image or compose(seed=1_000_000_007).image()
    full = generate(model, processor, question, image)
    options = {"pruner": "divprune+restore", "keep_ratio": 0.25}  # without a pruner it is `auto`
    pruned = generate(model, processor, question, image, **options)
    for name, answer in (("full", full), ("pruned", pruned)):
        print(
            f"{name}: {answer.text!r} from {answer.visual_tokens_kept:g} of {answer.visual_tokens}"
            f" visual tokens; first token after {answer.ttft_ms['total']:.0f} ms"
        )
    pruned.overlay().save("kept.png")  # the picture, with what was dropped dimmed
    print("kept.png shows which tokens were kept")


if __name__ == "__main__":
    main(*sys.argv[1:])
