"""A program as a user types it: mypy reads it strictly, and nothing runs it.

The last lines are mistakes that a type checker is to see; an unused `type: ignore` is an error.
"""

from mlx_vlm_prune import (
    Chat,
    GenerationResponse,
    GenerationResult,
    UserError,
    attach,
    batch_generate,
    generate,
    load,
    pruned,
    stream_generate,
)

model, processor = load()
try:
    answer: GenerationResult = generate(model, processor, "a ?", "a.png", keep_ratio=0.5)
except UserError as problem:
    print(problem)
total: float = answer.ttft_ms["total"]
answers: list[GenerationResult] = batch_generate(model, processor, ["a ?"], [None], max_tokens=3)
for piece in stream_generate(model, processor, "a ?", host_options={"kv_bits": 4}):
    response: GenerationResponse = piece
with pruned(model, keep_tokens=9) as report:
    print(report.kept)
chat = Chat(model, processor, pruner="cdpruner", keep_ratio=0.5)
answer = chat.ask("a ?", "a.png")
for piece in chat.stream("a ?"):
    response = piece
chat.configure(keep_tokens=9)
report, detach = attach(model, "norm", keep_ratio=0.5)
detach()

generate(model, processor, "a ?", keep_tokens="9")  # type: ignore[arg-type]
chat.configure(keep_token=9)  # type: ignore[call-arg]
batch_generate(model, processor, ["a ?"], max_token=9)  # type: ignore[call-arg]
vision: float = answer.ttft_ms["vision"]  # type: ignore[assignment]
