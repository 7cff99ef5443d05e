"""Promises of the converter: names, bytes, sizes, and what it says."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from convert.__main__ import main
from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints.families import read_checkpoint
from mlx_vlm_prune.checkpoints.minimind import tables as minimind_tables
from mlx_vlm_prune.checkpoints.minimind.generations import GENERATIONS
from mlx_vlm_prune.checkpoints.names import towers
from mlx_vlm_prune.checkpoints.names.rules import published_order, to_ours, to_published
from mlx_vlm_prune.checkpoints.reading.files import open_safetensors
from mlx_vlm_prune.checkpoints.reading.pth import read_pth
from mlx_vlm_prune.checkpoints.reading.tensors import RawTensor

from . import tiny

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@pytest.fixture
def published(tmp_path):
    """A random model as published, in float16, with its words."""
    tiny.publish(tiny.reference(), tmp_path, torch.float16)
    tiny.write_words(tmp_path / "words")
    return tmp_path


def to_mlx(folder, target="mlx", *more):
    source = [str(folder / "published.pth"), str(folder / target)]
    rest = ["--vision", str(folder / "clip"), "--tokenizer", str(folder / "words"), *more]
    main(["to-mlx", *source, *rest])
    return folder / target


def refused(capsys, *argv) -> str:
    """The one sentence of a conversion that must fail with code 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_to_mlx_and_back_gives_the_same_bytes(tmp_path, dtype):
    tiny.publish(tiny.reference(), tmp_path, DTYPES[dtype])
    tiny.write_words(tmp_path / "words")
    to_mlx(tmp_path)
    again, clip = tmp_path / "again.pth", tmp_path / "clip-again"
    main(["to-torch", str(tmp_path / "mlx"), str(again), "--vision", str(clip)])
    before, after = (torch.load(p, weights_only=True) for p in (tmp_path / "published.pth", again))
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        assert before[name].view(torch.uint8).equal(after[name].view(torch.uint8))
    tower, tower_again = (
        open_safetensors(f / "model.safetensors") for f in (tmp_path / "clip", clip)
    )
    assert tower == tower_again


def test_mlx_to_torch_and_back_gives_the_same_files(published):
    to_mlx(published)
    again = published / "again"
    again.mkdir()
    clip = again / "clip"
    main(["to-torch", str(published / "mlx"), str(again / "published.pth"), "--vision", str(clip)])
    shutil.copytree(published / "words", again / "words")
    to_mlx(again)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json"):
        assert (published / "mlx" / name).read_bytes() == (again / "mlx" / name).read_bytes(), name


def test_both_tied_tensors_come_back_and_only_one_is_kept(published):
    target = to_mlx(published)
    assert "lm_head.weight" not in "".join(open_safetensors(target / "model.safetensors"))
    main(["to-torch", str(target), str(published / "again.pth")])
    state = torch.load(published / "again.pth", weights_only=True)
    assert state["lm_head.weight"].equal(state["model.embed_tokens.weight"])


@pytest.mark.parametrize("generation", GENERATIONS.values(), ids=list(GENERATIONS))
def test_every_rule_has_a_way_back_and_no_name_has_two_rules(generation):
    table = generation.table
    for rule in table:
        published, ours = rule.published.replace("*", "12"), rule.ours.replace("*", "12")
        assert to_ours(table, published) == (ours, rule)
        assert to_published(table, ours) == (published, rule)
        others = [r for r in table if to_ours((r,), published) or to_published((r,), ours)]
        assert others == [rule]
    assert len({r.published for r in table}) == len({r.ours for r in table}) == len(table)


def test_every_table_is_used_by_some_generation():
    used = {rule for generation in GENERATIONS.values() for rule in generation.table}
    used |= {*towers.WHOLE_CLIP, *towers.WHOLE_SIGLIP}  # which `encode` reads
    modules = {**vars(minimind_tables), **vars(towers)}.items()
    tables = [value for name, value in modules if name.isupper() and name[0] != "_"]
    assert used == {rule for table in tables if isinstance(table, tuple) for rule in table}


def test_the_published_order_is_that_of_the_model():
    table = GENERATIONS["minimind2-v"].table
    names = [n for n in tiny.reference().state_dict() if not n.startswith("vision_encoder.")]
    kinds = [n.split(".")[1] for n in published_order(table, reversed(names))]
    assert kinds[0] == "embed_tokens" and kinds[-3:] == ["norm", "vision_proj", "vision_proj"]
    numbers = [n.split(".")[2] for n in published_order(table, reversed(names)) if ".layers." in n]
    assert numbers == sorted(numbers)


def test_rounding_equals_that_of_torch():
    values = torch.tensor([1 + 2**-9, 1 + 3 * 2**-9, -1e-8, 65519.0, 7e4, 3e38, float("inf")])
    values = torch.cat([values, torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 9])
    raw = RawTensor("F32", (len(values),), values.numpy().view(np.uint8))
    for code, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)):
        narrow = raw.astype(code)
        assert bytes(narrow.data) == bytes(values.to(dtype).view(torch.uint8).numpy())
        assert bytes(narrow.astype("F32").data) == bytes(
            values.to(dtype).float().view(torch.uint8).numpy()
        )
    nan = RawTensor("F32", (1,), np.array([np.nan], np.float32).view(np.uint8))
    assert np.isnan(nan.astype("BF16").astype("F32").data.view(np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_converts_every_tensor_and_says_so_in_the_config(published, dtype):
    target = to_mlx(published, "mlx", "--dtype", dtype)
    tensors = open_safetensors(target / "model.safetensors")
    code = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}[dtype]
    assert {tensor.dtype for tensor in tensors.values()} == {code}
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == dtype


def test_llama_and_clip_of_transformers_arrive_under_our_names(tmp_path):
    """The oracle: names and values from transformers' own classes, renamed here by hand."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tiny.words()), hidden_size=48, intermediate_size=64,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            image_size=64, patch_size=16,
        )
    )  # fmt: skip
    state = {k: v.clone() for k, v in llama.state_dict().items()}
    state["vision_proj.vision_proj.0.weight"] = torch.randn(48, 32)
    state["vision_proj.vision_proj.0.bias"] = torch.randn(48)
    torch.save(state, tmp_path / "published.pth")
    clip.save_pretrained(tmp_path / "clip")
    tiny.write_words(tmp_path / "words")
    ours = read_checkpoint(tmp_path / "published.pth", tmp_path / "clip", tmp_path / "words")
    assert ours.config["text_config"]["num_attention_heads"] == 4
    assert ours.config["vision_config"]["num_attention_heads"] == 2
    for name, tensor in state.items():
        if name != "lm_head.weight":
            at = "projector." + name.rpartition(".")[2] if "vision_proj" in name else "language."
            new = at if "vision_proj" in name else at + name.removeprefix("model.")
            assert bytes(ours.tensors[new].data) == bytes(
                tensor.flatten().view(torch.uint8).numpy()
            )
    for name, tensor in clip.state_dict().items():
        if "position_ids" in name:
            continue
        tensor = tensor.permute(0, 2, 3, 1).contiguous() if tensor.ndim == 4 else tensor
        new = "tower." + name.removeprefix("vision_model.")
        assert bytes(ours.tensors[new].data) == bytes(tensor.flatten().view(torch.uint8).numpy())


def test_masks_and_an_optimiser_are_left_behind(published):
    """A resume file: the model beside optimiser state, its tower inside, old mask buffers too."""
    state = {k: v.half() for k, v in tiny.reference().state_dict().items()}
    state["model.layers.0.self_attn.mask"] = torch.ones(4, 4)
    held = {"model": state, "optimizer": {"state": {}, "param_groups": []}, "epoch": 3}
    torch.save(held, published / "resume.pth")
    words = str(published / "words")
    main(["to-mlx", str(published / "resume.pth"), str(published / "a"), "--tokenizer", words])
    to_mlx(published, "b")
    a, b = (open_safetensors(published / x / "model.safetensors") for x in "ab")
    assert a == b


def test_efficientvlms_learned_queries_go_both_ways_and_fix_k(published):
    state = torch.load(published / "published.pth", weights_only=True)
    width, K = tiny.VISION.hidden_size, 5
    learned = {"vision_proj.pool_queries": torch.randn(K, width).half()}
    for x in "qkv":
        learned[f"vision_proj.pool_{x}_proj.weight"] = torch.randn(width, width).half()
        learned[f"vision_proj.pool_{x}_proj.bias"] = torch.randn(width).half()
    torch.save(state | learned, published / "published.pth")
    target = to_mlx(published)
    config = json.loads((target / "config.json").read_text())
    assert config["pruner"] == {"name": "attention_pool", "tokens": K}
    model, _ = load(target)
    assert model.pruner.tokens == K
    main(["to-torch", str(target), str(published / "again.pth")])
    again = torch.load(published / "again.pth", weights_only=True)
    assert again.keys() == (state | learned).keys()
    assert all(again[name].equal(tensor) for name, tensor in (state | learned).items())


def test_load_reads_a_published_folder_without_converting_it_first(published):
    target = to_mlx(published)
    folder = published / "as-published"
    folder.mkdir()
    (published / "published.pth").rename(folder / "sft_vlm_48.pth")
    (published / "clip").rename(folder / "clip")
    for file in (published / "words").iterdir():
        shutil.copy(file, folder)
    direct, _ = load(folder, dtype="float32")
    converted, _ = load(target, dtype="float32")
    for (name, a), (_, b) in zip(weights(direct), weights(converted), strict=True):
        assert np.array(a).tobytes() == np.array(b).tobytes(), name


def weights(model):
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())


def test_shards_are_put_together(published):
    to_mlx(published)
    clip = published / "clip"
    from safetensors.torch import load_file, save_file

    whole = load_file(clip / "model.safetensors")
    names = sorted(whole)
    (clip / "model.safetensors").unlink()
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for part, held in parts.items():
        save_file({name: whole[name] for name in held}, clip / part)
    index = {"weight_map": {name: part for part, held in parts.items() for name in held}}
    (clip / "model.safetensors.index.json").write_text(json.dumps(index))
    to_mlx(published, "again")
    a, b = (published / x / "model.safetensors" for x in ("mlx", "again"))
    assert a.read_bytes() == b.read_bytes()


def test_heads_are_assumed_as_published_and_can_be_given(published, capsys):
    to_mlx(published)
    assert "2 key/value heads (assumed, as in every MiniMind2)" in capsys.readouterr().out
    target = to_mlx(published, "b", "--heads", "8", "--kv-heads", "4")
    text = json.loads((target / "config.json").read_text())["text_config"]
    assert (text["num_attention_heads"], text["num_key_value_heads"]) == (8, 4)
    assert "(assumed" not in capsys.readouterr().out


def test_what_is_written_says_mlx_and_is_sorted(published):
    target = to_mlx(published)
    with safe_open(target / "model.safetensors", "np") as opened:
        assert opened.metadata() == {"format": "mlx"}
    config = (target / "config.json").read_text()
    assert config == json.dumps(json.loads(config), indent=4, sort_keys=True) + "\n"


def test_a_bin_of_torch_is_read_as_a_clip_folder_too(published):
    to_mlx(published)
    clip = published / "clip"
    from safetensors.torch import load_file

    torch.save(load_file(clip / "model.safetensors"), clip / "pytorch_model.bin")
    (clip / "model.safetensors").unlink()
    to_mlx(published, "again")
    a, b = (published / x / "model.safetensors" for x in ("mlx", "again"))
    assert a.read_bytes() == b.read_bytes()


def test_a_state_dict_reads_the_same_from_both_kinds_of_file(published):
    state = read_pth(published / "published.pth")
    loaded = torch.load(published / "published.pth", weights_only=True)
    for name, tensor in loaded.items():
        assert bytes(state[name].data) == bytes(tensor.flatten().view(torch.uint8).numpy())
