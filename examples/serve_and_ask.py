"""Start the server, ask it with OpenAI's client, each request with a budget of its own, and end it.

python examples/serve_and_ask.py
python examples/serve_and_ask.py photo.jpg "What is this?" mlx-community/Qwen2.5-VL-3B-Instruct-4bit

Needs `pip install 'mlx_vlm_prune[serve]' openai`. docs/serving.md has all that a request may say.
"""

import base64
import subprocess
import sys
from pathlib import Path

from openai import OpenAI

from mlx_vlm_prune.scenes import compose


def main(image=None, question="What does the sign say?", model_name=None):
    if image is None:
        image = "scene.png"
        compose(seed=1_000_000_007).image().save(image)
    url = "data:image/png;base64," + base64.b64encode(Path(image).read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    command = [sys.executable, "-m", "mlx_vlm_prune.serve", "--port", "0"]  # a free port
    command += ["--model", model_name] if model_name else []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            lines = (line for line in server.stderr if "http://" in line)
            client = OpenAI(base_url=next(lines).split()[-1], api_key="none")
            for budget in ({}, {"keep_ratio": 0.5}, {"visual_tokens": 49, "pruner": "divprune"}):
                ask(client, content, budget)
        finally:
            server.terminate()


def ask(client, content, budget):
    answer = client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": content}], extra_body=budget
    )
    usage, text = answer.usage, answer.choices[0].message.content
    print(f"{usage.visual_tokens_kept} of {usage.visual_tokens} visual tokens: {text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
