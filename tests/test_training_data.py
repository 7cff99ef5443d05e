"""Promises of training's batches: what they hold, in which order, and what is left out."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.inputs.processor import Processor
from mlx_vlm_prune.training.batches import WINDOW, Reader, Sampler
from mlx_vlm_prune.training.examples import Example

from . import tiny
from .training_examples import (
    CONFIG,
    example,
    of_words,
    png,
)


@pytest.fixture
def words(tmp_path) -> Processor:
    return of_words(tmp_path / "words")


class Pictures:
    """Examples about a picture each; some are broken, one is long."""

    blocks = None

    def __init__(self, count: int, bad: tuple[int, ...] = (), long: int = -1):
        self.count, self.bad, self.long, self.read = count, bad, long, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read.append(index)
        picture = b"GIF" if index in self.bad else png(index)
        turns = (("is there a star ?", "yes"),) * (9 if index == self.long else 1)
        return Example((picture,), turns, f"row {index}")


def reader(words, dataset, skip_bad=False, most=60, **config):
    text = SimpleNamespace(**{**vars(CONFIG.text), **config})
    return Reader(dataset, words, SimpleNamespace(N=16, text=text), most, skip_bad)


def test_a_broken_picture_is_an_error_or_named_counted_and_left_out(words, caplog):
    with pytest.raises(UserError, match=r"row 1: the image is not a .* \(skip_bad leaves"):
        reader(words, Pictures(4, bad=(1,))).batch(np.arange(4))
    data = reader(words, Pictures(4, bad=(1, 2)), skip_bad=True)
    for _ in range(2):
        assert data.batch(np.arange(4)).indices == (0, 3)
    assert list(data.bad) == [1, 2] and "row 2" in data.bad[2]
    assert [r.message.split(":")[1] for r in caplog.records] == [" row 1", " row 2"]
    assert data.batch(np.array([1, 2])) is None


def test_what_was_cut_is_counted_once(words):
    data = reader(words, Pictures(3, long=1))
    for _ in range(2):
        batch = data.batch(np.arange(3))
        assert [len(prompt.ids) for prompt in batch.prompts][1] == 60
    assert data.cut == {1} and not data.bad


def test_no_picture_is_resized_but_by_the_models_own_processor(words):
    data = reader(words, Pictures(0))
    photo = png(7, (701, 333))
    read, (pixels,) = data._prepare(example([photo], ("is there a star ?", "yes")))
    expected = words.image(Image.open(io.BytesIO(photo)).convert("RGB"))
    assert (pixels == expected).all() and read.prompt.runs[0][1] == 16


def test_a_tokenizer_with_more_words_than_the_model_is_refused(words):
    with pytest.raises(
        UserError, match=r"has ids up to \d+, but the model's vocabulary has 20 entries"
    ):
        reader(words, Pictures(1), vocab_size=20)


def in_turn(data, numbers, ahead=2):
    """The batches as a trainer reads them."""
    numbers = list(numbers)
    for n, indices in enumerate(numbers):
        yield data.batch(indices, numbers[n + 1 : n + 1 + ahead])


def test_batches_read_ahead_are_those_read_one_by_one(words):
    order, one = Sampler(10, 3, seed=1), reader(words, Pictures(10))
    ahead = reader(words, Pictures(10))
    numbers = [order.indices(n) for n in range(7)]
    for indices, batch in zip(numbers, in_turn(ahead, numbers), strict=True):
        expected = one.batch(indices)
        assert batch.indices == expected.indices == tuple(indices)
        assert batch.prompts == expected.prompts
        assert (batch.pixels_IHW3 == expected.pixels_IHW3).all()
    assert ahead.dataset.read == one.dataset.read  # nothing twice


def test_a_fault_ahead_is_raised_and_counted_when_its_batch_is_due(words):
    singles = [np.array([n]) for n in range(9)]
    batches = in_turn(reader(words, Pictures(9, bad=(3,))), singles)
    assert [next(batches).indices for _ in range(3)] == [(0,), (1,), (2,)]
    with pytest.raises(UserError, match="row 3"):
        next(batches)
    data = reader(words, Pictures(9, bad=(1, 3), long=2), skip_bad=True)
    batches = in_turn(data, singles)
    assert next(batches).indices == (0,) and not data.bad
    assert next(batches) is None and list(data.bad) == [1] and not data.cut
    assert next(batches).indices == (2,) and data.cut == {2}
    assert len(data.dataset.read) <= 5


def test_the_order_is_new_in_every_pass_and_the_seeds_alone():
    order = Sampler(10, 4, seed=3)
    passes = np.concatenate([order.indices(n) for n in range(5)]).reshape(2, 10)
    assert [sorted(numbers) for numbers in passes.tolist()] == [list(range(10))] * 2
    assert (passes[0] != passes[1]).any()
    assert (Sampler(10, 4, seed=3).indices(3) == order.indices(3)).all()
    assert (Sampler(10, 4, seed=4).indices(0) != order.indices(0)).any()


@pytest.mark.parametrize(("groups", "blocks"), [(1, 64), (64, 1), (5, 13)])
def test_blocks_are_shuffled_and_few_of_them_are_read_at_a_time(groups, blocks):
    starts = np.arange(0, 3 * groups * blocks, 3).reshape(groups, blocks).tolist()
    parts = [[range(start, start + 3) for start in group] for group in starts]
    order = Sampler(3 * groups * blocks, 8, seed=0, blocks=parts)
    numbers = np.concatenate([order.indices(n) for n in range(order.examples // 8)])
    assert len(set(numbers.tolist())) == len(numbers)
    spans = [len(set((numbers[n : n + 48] // 3).tolist())) for n in range(0, len(numbers) - 48, 48)]
    assert max(spans) <= WINDOW
    assert (np.diff(numbers[:40]) != 1).mean() > 0.8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from mlx_vlm_prune.models.loading import load_folder

    folder = tiny.checkpoint(tiny.taught(tiny.reference()), tmp_path_factory.mktemp("tiny"))
    return load_folder(folder, "tiny")[0]


@pytest.mark.parametrize("spec", ["none", "cls_attention", "fastv", "cdpruner", "mlp:dynamic=true"])
def test_the_loss_of_a_batch_is_that_of_its_examples_with_several_images_one_or_none(model, spec):
    import mlx.core as mx
    from mlx import nn

    from mlx_vlm_prune.pruners import plan
    from mlx_vlm_prune.training.batches import Batch
    from mlx_vlm_prune.training.loss import answer_loss

    prompts = [
        tiny.row("user # is there"),
        tiny.row("what colour ? red"),
        tiny.row("# and # say no"),
    ]
    pictures = np.random.normal(size=(3, 64, 64, 3)).astype(np.float32)
    of_prompt, pipeline = ([0], [], [1, 2]), plan(spec, model.learned)

    def read(*numbers):
        flags = [np.arange(len(prompts[n].ids)) >= len(prompts[n].ids) - 2 for n in numbers]
        images = [i for n in numbers for i in of_prompt[n]]
        pixels = pictures[images] if images else None
        return Batch([prompts[n] for n in numbers], flags, pixels)

    def loss(*numbers):
        return answer_loss(model, read(*numbers), pipeline, model.N if spec == "none" else 12)

    each = [loss(n).item() for n in range(3)]
    assert loss(0, 1, 2).item() == pytest.approx(sum(each), rel=1e-5)
    assert loss(2, 1).item() == pytest.approx(each[2] + each[1], rel=1e-5)
    assert loss(1, 1).item() == pytest.approx(2 * each[1], rel=1e-5)
    gradients = nn.value_and_grad(model.projector, lambda: loss(1))()[1]
    assert all(mx.all(gradient == 0).item() for gradient in gradients.values())
