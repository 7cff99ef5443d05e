"""Promises of the CLIP and SigLIP encoders: transformers' numbers, and methods with an oracle."""

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mlx_vlm_prune import UserError, encode_images, encode_texts, load_encoder
from mlx_vlm_prune.evaluation.encoding import cosines
from mlx_vlm_prune.pruners import METHODS, Stage

from . import dual_encoders as tiny
from .dual_encoders import N

TEXTS = ["a photo of a cat", "a hot dog", "it is a red star on a big white photo", "dog"]
KINDS = {"clip": tiny.random_clip, "siglip": tiny.random_siglip}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """transformers' model, and ours with its processor."""
    folder = tmp_path_factory.mktemp(request.param)
    published = KINDS[request.param]()
    return published, *load_encoder(tiny.write(published, folder), dtype="float32")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    published = tiny.random_clip()
    return published, *load_encoder(
        tiny.write(published, tmp_path_factory.mktemp("clip")), dtype="float32"
    )


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    published = tiny.random_siglip()
    return published, *load_encoder(
        tiny.write(published, tmp_path_factory.mktemp("siglip")), dtype="float32"
    )


def pixels_of(processor, count: int = 3) -> torch.Tensor:
    """(B, 3, H, W), as transformers has the axes."""
    pixels = np.stack([processor.image(picture) for picture in tiny.pictures(count)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def image_features(published, pixels: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return published.get_image_features(pixel_values=pixels).pooler_output.numpy()


def text_features(published, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return published.get_text_features(input_ids=torch.from_numpy(ids)).pooler_output.numpy()


def assert_equal(ours, theirs, within: float = 1e-4):
    largest = np.abs(theirs).max()
    assert largest > 0.01
    np.testing.assert_allclose(np.array(ours), theirs, rtol=within, atol=0.1 * within * largest)


def test_all_tokens_give_transformers_features(pair):
    published, model, processor = pair
    theirs = image_features(published, pixels_of(processor))
    assert_equal(encode_images(model, processor, tiny.pictures(3), batch_size=2), theirs)
    assert np.linalg.norm(theirs[0] - theirs[1]) > 0.01 * np.linalg.norm(theirs[0])


def test_texts_give_transformers_features(pair):
    published, model, processor = pair
    theirs = text_features(published, processor.captions(TEXTS))
    assert_equal(encode_texts(model, processor, TEXTS), theirs)
    assert_equal(encode_texts(model, processor, TEXTS[0]), theirs[:1])


FULL = {
    "clip": lambda: tiny.random_clip(
        {"patch_size": 16}, {"vocab_size": 49408, "hidden_size": 512}, 512
    ),
    "siglip": lambda: tiny.random_siglip({"patch_size": 16}, {"vocab_size": 32000}),
}


@pytest.mark.parametrize("kind", FULL)
def test_the_full_size_gives_transformers_features(kind, tmp_path):
    """ViT-B/16 at 224 pixels with its text tower, random weights."""
    published = FULL[kind]()
    model, processor = load_encoder(tiny.write(published, tmp_path / kind), dtype="float32")
    assert (model.N, model.config.vision.num_hidden_layers) == (196, 12)
    pictures = tiny.pictures(2, 240)
    pixels = np.stack([processor.image(picture) for picture in pictures]).transpose(0, 3, 1, 2)
    theirs = image_features(published, torch.from_numpy(np.ascontiguousarray(pixels)))
    full = encode_images(model, processor, pictures)
    assert_equal(full, theirs)
    whole = encode_images(model, processor, pictures, "patch_norm", keep_ratio=1.0)
    assert (full == whole).all().item()
    half = encode_images(model, processor, pictures, "patch_norm", keep_ratio=0.5)
    assert mx.isfinite(half).all().item() and not (half == full).all().item()
    top = published.config.text_config.vocab_size - 1
    ids = np.random.default_rng(0).integers(3, top, size=(3, 20))
    ids[:, -1] = top  # the end token
    assert_equal(model.encode_texts(ids), text_features(published, ids))


def test_openclips_activation_is_followed(tmp_path, clip):
    """LAION's CLIPs have gelu, by which they differ from OpenAI's."""
    act = {"hidden_act": "gelu"}
    sizes = {"vocab_size": clip[1].config.text.vocab_size}
    published = tiny.random_clip(tiny.VISION | act, tiny.TEXT | sizes | act)
    model, processor = load_encoder(tiny.write(published, tmp_path / "c"), dtype="float32")
    theirs = image_features(published, pixels_of(processor, 2))
    assert_equal(encode_images(model, processor, tiny.pictures(2)), theirs)
    theirs = text_features(published, processor.captions(TEXTS))
    assert_equal(encode_texts(model, processor, TEXTS), theirs)


def test_patch_norm_is_the_notebook_that_it_comes_from(clip):
    """ece1512-projectA's: the longest patch embeddings, each with its own position row, through the
    whole tower, CLS after post_layernorm through the projection."""
    published, model, processor = clip
    tower, K = published.vision_model, 7
    with torch.no_grad():
        patches = tower.embeddings.patch_embedding(pixels_of(processor)).flatten(2).transpose(1, 2)
        index = patches.norm(dim=-1).topk(K).indices.sort().values
        cls = tower.embeddings.class_embedding.expand(len(patches), 1, -1)
        kept = patches.gather(1, index[..., None].expand(-1, -1, patches.shape[-1]))
        rows = tower.embeddings.position_embedding.weight
        x = torch.cat([cls + rows[0], kept + rows[1 + index]], dim=1)
        x = tower.encoder(tower.pre_layrnorm(x)).last_hidden_state
        theirs = published.visual_projection(tower.post_layernorm(x[:, 0])).numpy()
    ours = encode_images(model, processor, tiny.pictures(3), "patch_norm", keep_tokens=K)
    assert_equal(ours, theirs)


def test_the_notebook_compares_two_embeddings_of_which_one_is_not_normed(clip):
    """So its consistency is below 1 with every token kept, and its texts are all one vector."""
    published, _, processor = clip
    with torch.no_grad():
        x = published.vision_model(pixels_of(processor)).last_hidden_state[:, 0]
        normed = published.vision_model.post_layernorm(x)
        theirs, ours = (published.visual_projection(y).numpy() for y in (x, normed))
        ids = torch.from_numpy(processor.captions(TEXTS))
        texts = published.text_model(input_ids=ids).last_hidden_state[:, 0].numpy()
    assert_equal(encode_images(*clip[1:], tiny.pictures(3)), ours)
    assert (cosines(theirs, ours) < 0.99).all()
    np.testing.assert_allclose(texts, texts[:1].repeat(len(texts), 0), rtol=1e-5, atol=1e-6)


def test_norm_in_front_of_siglips_head_is_its_head_on_the_longest_features(siglip):
    published, model, processor = siglip
    with torch.no_grad():
        x = published.vision_model(pixels_of(processor)).last_hidden_state
        index = x.norm(dim=-1).topk(5).indices
        kept = x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
        theirs = published.vision_model.head(kept).numpy()
    ours = encode_images(model, processor, tiny.pictures(3), "norm", keep_tokens=5)
    assert_equal(ours, theirs)


def test_a_merged_token_counts_in_siglips_head_as_often_as_it_has_members(siglip):
    """Merging equal tokens changes nothing then."""
    _, model, _ = siglip
    x_BND = mx.random.normal((1, 4, 32))
    twice = mx.concatenate([x_BND, x_BND[:, :1]], axis=1)
    size_BN = mx.array([[2.0, 1, 1, 1]])
    np.testing.assert_allclose(
        model.head(x_BND, mx.log(size_BN)), model.head(twice), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if not m.learned])
def test_every_method_works_or_says_why_not(name, pair):
    _, model, processor = pair
    method, is_clip = METHODS[name], model.config.is_clip
    images, full = tiny.pictures(2), encode_images(model, processor, tiny.pictures(2))
    works = method.stage in (Stage.IMAGE, Stage.ENCODER)
    works |= method.stage is Stage.FEATURES and (not is_clip or name == "none")
    name = "kq_norm:layer=1" if name == "kq_norm" else name  # behind the last one none is read
    spec = f"norm+{name}" if method.stage is Stage.ENHANCER else name
    if not works:
        with pytest.raises(UserError, match=r"CLIP|SigLIP"):
            encode_images(model, processor, images, spec, keep_tokens=9)
        return
    whole = encode_images(model, processor, images, spec, keep_ratio=1.0)
    assert (whole == full).all().item()
    if name != "none":
        pruned = encode_images(model, processor, images, spec, keep_tokens=9)
        assert mx.isfinite(pruned).all().item() and not (pruned == full).all().item()


def test_what_leaves_behind_clips_last_attention_is_refused(clip, siglip):
    refused, works = (
        [model, processor, tiny.pictures(1), "kq_norm"] for _, model, processor in (clip, siglip)
    )
    with pytest.raises(UserError, match=r"give an earlier layer, as in kq_norm:layer=1$"):
        encode_images(*refused, keep_tokens=4)
    assert encode_images(*works, keep_tokens=4).shape == (1, 32)


def test_methods_chain_across_the_tower(siglip):
    _, model, processor = siglip
    chain = encode_images(model, processor, tiny.pictures(2), "tome+norm", keep_tokens=4)
    assert mx.isfinite(chain).all().item()


def test_an_image_does_not_depend_on_its_neighbours(pair):
    _, model, processor = pair
    images = tiny.pictures(3)
    together = encode_images(model, processor, images, "patch_norm", keep_tokens=6)
    alone = encode_images(model, processor, images[2], "patch_norm", keep_tokens=6)
    np.testing.assert_allclose(alone[0], together[2], rtol=1e-4, atol=1e-5)


CAPTIONS = [
    "a photo of a cat", "A  HOT dog!", "it's the cat's, isn't it?", "two\tstars\n", "zebra 42 ü",
    "a", "", "…", "red-blue (star) & <|endoftext|>",
]  # fmt: skip


def test_clips_ids_are_transformers_ids(clip):
    _, _, processor = clip
    expected = tiny.clip_tokenizer()(CAPTIONS, padding=True).input_ids
    assert processor.captions(CAPTIONS).tolist() == expected


def test_siglips_ids_are_transformers_ids(siglip):
    _, model, processor = siglip
    tokenizer = transformers.SiglipTokenizer(str(processor.folder / "spiece.model"))
    length = model.config.text.max_position_embeddings
    captions = [text for text in CAPTIONS if "<" not in text]
    ids = tokenizer(captions, padding="max_length", max_length=length).input_ids
    assert processor.captions(captions).tolist() == ids


def test_a_text_that_is_too_long_is_refused(pair):
    _, model, processor = pair
    most = model.config.text.max_position_embeddings
    with pytest.raises(UserError, match=rf"tokens; this model reads {most}$"):
        encode_texts(model, processor, "cat " * 90)


def test_a_config_from_before_the_end_token_was_right_reads_the_largest_id(tmp_path, clip):
    published, _, processor = clip
    folder = tiny.write(published, tmp_path / "clip")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["eos_token_id"] = 2
    file.write_text(json.dumps(config))
    model, processor = load_encoder(folder, dtype="float32")
    theirs = text_features(published, processor.captions(TEXTS))
    assert_equal(encode_texts(model, processor, TEXTS), theirs)


def test_older_files_have_their_sizes_in_a_second_part(tmp_path, clip):
    """text_config_dict and vision_config_dict stand in the place of those without _dict."""
    published, _, _ = clip
    folder = tiny.write(published, tmp_path / "clip")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for part in ("text_config", "vision_config"):
        config[f"{part}_dict"] = config[part]
        config[part] = {"hidden_size": 7}
    file.write_text(json.dumps(config))
    assert load_encoder(folder)[0].N == N


def test_half_precision_stays_near(tmp_path, clip):
    published, model, processor = clip
    half, _ = load_encoder(tiny.write(published, tmp_path / "h", torch.float16), dtype="float16")
    assert half.dtype == mx.float16
    ours = encode_images(half, processor, tiny.pictures(2)).astype(mx.float32)
    full = np.array(encode_images(model, processor, tiny.pictures(2)))
    np.testing.assert_allclose(ours, full, atol=2e-2 * np.abs(full).max())


def test_a_siglip_whose_last_pixels_are_in_no_patch(tmp_path):
    """As so400m-patch14-384: 384 pixels are 27 patches of 14, and 6 pixels more."""
    published = tiny.random_siglip(tiny.VISION | {"image_size": 70})
    model, processor = load_encoder(tiny.write(published, tmp_path / "s"), dtype="float32")
    pixels = pixels_of(processor, 2)
    assert pixels.shape[-1] == 70 and model.grid == (4, 4)
    ours = encode_images(model, processor, tiny.pictures(2))
    assert_equal(ours, image_features(published, pixels))
    for name in ("pixelprune", "downsample"):
        assert encode_images(model, processor, tiny.pictures(2), name, keep_tokens=4).shape == (
            2,
            32,
        )


DAMAGED = {
    "no whole CLIP or SigLIP": {"model_type": "bert"},
    "has no model_type, so it is no whole": {"model_type": None},
    "one half": {"model_type": "clip_vision_model"},
    "hidden_act is 'relu', not quick_gelu, gelu or": {"text_config": {"hidden_act": "relu"}},
    "vocab_size is -1": {"text_config": {"vocab_size": -1}},
    "do not divide evenly": {"vision_config": {"num_attention_heads": 5}},
    "is expected": {"projection_dim": 25},
    "num_channels is 4": {"vision_config": {"num_channels": 4}},
    "vision_config is 3, not an object": {"vision_config": 3},
    "pixels, but the tower reads 32 x 32": {"vision_config": {"image_size": 32}},
}


@pytest.mark.parametrize("sentence", DAMAGED)
def test_a_damaged_config_is_refused(sentence, tmp_path, clip):
    folder = tiny.write(clip[0], tmp_path / "clip")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for name, value in DAMAGED[sentence].items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(config))
    if "32 x 32" in sentence:  # its position rows would be too many
        sentence = "is expected"
    with pytest.raises(UserError, match=sentence):
        load_encoder(folder)


def test_a_tensor_too_few_or_too_many_is_named(tmp_path, siglip):
    folder = tiny.write(siglip[0], tmp_path / "s")
    state = load_file(folder / "model.safetensors")
    probe = state.pop("vision_model.head.probe")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks the tensor head\.probe"):
        load_encoder(folder)
    state |= {"vision_model.head.probe": probe, "surplus": probe.clone()}
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match="holds a tensor surplus; a SigLIP has no place for it"):
        load_encoder(folder)


def test_older_files_hold_buffers_that_are_left_out(tmp_path, clip):
    folder = tiny.write(clip[0], tmp_path / "c")
    state = load_file(folder / "model.safetensors")
    for half, length in (("vision", N + 1), ("text", 77)):
        state[f"{half}_model.embeddings.position_ids"] = torch.arange(length)[None]
    save_file(state, folder / "model.safetensors")
    assert load_encoder(folder)[0].N == N
