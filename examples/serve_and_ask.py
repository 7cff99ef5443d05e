"""Start the server, ask it with OpenAI's client, each request with a budget of its own, and end it.

python examples/serve_and_ask.py
python examples/serve_and_ask.py photo.jpg "What is this?" mlx-community/Qwen2.5-VL-3B-Instruct-4bit

Needs `pip install 'mlx-vlm-prune[serve]' openai`. docs/serving.md has all that a request may say.
"""

import base64
import mimetypes
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE, Popen

from openai import OpenAI

from mlx_vlm_prune.scenes import compose


def main(image=None, question="What does the sign say?", model_name=None):
    if image is None:
        image = "scene.png"
        compose(seed=1_000_000_007).image().save(image)
    kind = mimetypes.guess_type(image)[0] or "image/png"
    url = f"data:{kind};base64," + base64.b64encode(Path(image).read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    command = [sys.executable, "-m", "mlx_vlm_prune.serve", "--port", "0"]  # a free port
    command += ["--model", model_name] if model_name else []
    with Popen(command, stderr=PIPE, text=True) as server, ThreadPoolExecutor() as reader:
        try:
            client = OpenAI(base_url=address(server), api_key="none")
            # A full pipe would stop the server.
            reader.submit(shutil.copyfileobj, server.stderr, sys.stderr)
            for budget in ({}, {"keep_ratio": 0.5}, {"visual_tokens": 49, "pruner": "divprune"}):
                ask(client, content, budget)
        finally:
            server.terminate()


def address(server):
    for line in server.stderr:
        if "http://" in line:
            return line.split()[-1]
        sys.stderr.write(line)
    sys.exit(server.wait())  # what it wrote says why


def ask(client, content, budget):
    answer = client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": content}], extra_body=budget
    )
    usage, text = answer.usage, answer.choices[0].message.content
    print(f"{usage.visual_tokens_kept} of {usage.visual_tokens} visual tokens: {text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
