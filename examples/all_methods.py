"""Ask about one picture with every method at one budget, and print what each kept and answered.

python examples/all_methods.py
python examples/all_methods.py photo.jpg "What is this?" mlx-community/Qwen2.5-VL-3B-Instruct-4bit

Without arguments: the built-in model, about a scene that is drawn here. `mlx-vlm-prune sweep`
measures methods with care: full and pruned in turns, several runs, medians.
"""

import sys

from mlx_vlm_prune import PRUNERS, Stage, UserError, generate, load
from mlx_vlm_prune.scenes import compose

KEEP_RATIO = 0.5


def main(image=None, question="What does the sign say?", model_name=None):
    model, processor = load(model_name)
    image = image or compose(seed=1_000_000_007).image()
    for name, method in PRUNERS.items():
        if method.stage is Stage.ENHANCER:
            continue  # an addition to a method: divprune+restore
        budget = {} if name == "none" else {"keep_ratio": KEEP_RATIO}
        try:
            answer = generate(model, processor, question, image, pruner=name, **budget)
        except UserError as reason:  # a method that this model cannot have, or this budget
            print(f"{name:<20} {reason}")
            continue
        kept = f"{answer.visual_tokens_kept:g} of {answer.visual_tokens}"
        print(f"{name:<20} {kept:<14} {answer.ttft_ms['total']:>5.0f} ms  {answer.text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
