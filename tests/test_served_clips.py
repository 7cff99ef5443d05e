"""Promises of mlx-vlm's HTTP server about clips: a `prune-into` folder prunes them."""

import json

import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
pytest.importorskip("uvicorn", reason="mlx-vlm's server needs uvicorn")
from mlx_vlm_prune import load, pruned
from mlx_vlm_prune.hosts.pruned_folder import prune_into

from . import host_folders
from .test_served import KIND, METHOD, RATIO, TOKENS, command
from .test_video import film

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


def test_a_clip_is_pruned_as_mlx_vlms_generate_prunes_it(tmp_path):
    from mlx_vlm import apply_chat_template
    from mlx_vlm import generate as theirs

    home = host_folders.desk(tmp_path, [KIND])
    prune_into(home / KIND, home / "pruned", METHOD, RATIO, None)
    model, processor = load(home / KIND)
    file = str(film(home / "clip.avi", 20, 10))
    text = apply_chat_template(processor, model.config, "w7 w9", video=[file])
    options = {"video": [file], "max_tokens": TOKENS, "temperature": 0.0}
    plain = theirs(model, processor, text, **options)
    with pruned(model, METHOD, keep_ratio=RATIO) as report:
        expected = theirs(model, processor, text, **options)
    assert report.kept == int(report.total * RATIO) and expected.text != plain.text
    video = {"type": "video_url", "video_url": {"url": file}}
    content = [video, {"type": "text", "text": "w7 w9"}]
    with command(home, "pruned") as server:
        body = {"model": server.model, "messages": [{"role": "user", "content": content}]}
        body |= {"max_tokens": TOKENS, "temperature": 0}
        answer = json.loads(server.call("/v1/chat/completions", json.dumps(body).encode()))
    (choice,) = answer["choices"]
    assert choice["message"]["content"].strip() == expected.text.strip()
