"""Prune inside mlx-vlm's own `generate`: the model stays mlx-vlm's, and so does the loop.

python examples/prune_mlx_vlm.py mlx-community/Qwen2.5-VL-3B-Instruct-4bit photo.jpg "What is this?"

Needs `pip install 'mlx-vlm-prune[mlx-vlm]'`. `mlx-vlm-prune convert prune-into MODEL FOLDER` makes
a folder of the model that prunes in every tool of mlx-vlm, its server too, without any Python.
"""

import sys

from mlx_vlm_prune import pruned  # before mlx: it sets up the fast BLAS on Linux

# isort: split
from mlx_vlm import generate, load
from mlx_vlm.prompt_utils import apply_chat_template


def main(model_name, image, question):
    model, processor = load(model_name)
    prompt = apply_chat_template(processor, model.config, question, num_images=1)

    def answer():
        return generate(model, processor, prompt, image=image, max_tokens=64, verbose=False)

    print("full:  ", answer().text)
    with pruned(model, "divprune", keep_ratio=0.25, processor=processor) as report:
        print("pruned:", answer().text)
    print(report)  # Visual tokens: 1296 -> 324 (75.0% pruned)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python examples/prune_mlx_vlm.py MODEL IMAGE QUESTION")
    main(*sys.argv[1:])
