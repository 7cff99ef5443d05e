"""Small tasks in lmms-eval's format, on disk: questions about scenes.

A folder of tasks goes to `--include_path`; nothing is downloaded.
"""

import json
from pathlib import Path

from mlx_vlm_prune.scenes import HELD_OUT_SEEDS, compose, draw, question_set

UTILS = '''
from pathlib import Path
from PIL import Image

HOME = Path(__file__).parent


def pictures(doc):
    return [Image.open(HOME / name).convert("RGB") for name in doc["pictures"]]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def is_right(doc, results):
    return {"right": float(results[0].strip() == doc["answer"])}


def messages(doc, lmms_eval_specific_kwargs=None):
    """An example first, then a text around a picture."""
    first, second = pictures(doc)[:2]
    shown = [{"type": "image", "url": first}, {"type": "text", "text": "Read the sign."}]
    parts = [{"type": "text", "text": doc["question"]}, {"type": "image", "url": second}]
    return [
        {"role": "user", "content": shown},
        {"role": "assistant", "content": [{"type": "text", "text": "xyz"}]},
        {"role": "user", "content": parts},
    ]
'''
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: !function utils.text
{more}
metadata:
  - version: 0.0
"""
ANSWERED = """doc_to_target: answer
generation_kwargs:
  max_new_tokens: {tokens}
  temperature: 0
  do_sample: false
  num_beams: 1
  until: {until}
process_results: !function utils.is_right
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
"""


def write_tasks(folder: Path, count: int = 4, words: bool = False) -> list[dict]:
    """`scenes_answered`, `scenes_talked` (with messages); their documents.

    With `words` the questions are those of a tiny model whose words are w3 to w58.
    """
    folder.mkdir(parents=True)
    (folder / "utils.py").write_text(UTILS, encoding="utf-8")
    docs = []
    for n, (scene, questions) in enumerate(question_set(HELD_OUT_SEEDS, count)):
        draw(scene).save(folder / f"{n}.png")
        compose(1_500_000_000 + n).image().save(folder / f"other-{n}.png")
        question = questions[0]
        docs.append({
            "question": f"w7 w{9 + n}" if words else question.text, "answer": str(question.answer),
            "pictures": [f"{n}.png", f"other-{n}.png"][: 1 + (n == 0)],
        })  # fmt: skip
        if len(docs) == count:
            break
    answered = ANSWERED.format(tokens=8, until="['q q q']")
    talked = ANSWERED.format(tokens=3, until="'z'") + "doc_to_messages: !function utils.messages\n"
    pairs = [
        {**doc, "pictures": [doc["pictures"][0], f"other-{n}.png"]} for n, doc in enumerate(docs)
    ]
    for name, more, listed in (
        ("scenes_answered", answered, docs),
        ("scenes_talked", talked, pairs),
    ):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(doc) + "\n" for doc in listed), encoding="utf-8")
        task = TASK.format(name=name, data=data, more=more)
        (folder / f"{name}.yaml").write_text(task, encoding="utf-8")
    return docs
