"""Promises about mlx-vlm's server: a prompt that is refused ends no other answer."""

from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_vlm_prune import load, pruned
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.pruned_folder import prune_into
from mlx_vlm_prune.hosts.served import EMBED, RefusedIds

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
pytest.importorskip("uvicorn", reason="mlx-vlm's server needs uvicorn")
from . import host_folders

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
KIND, METHOD, RATIO = "qwen3_vl", "divprune", 0.25


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = host_folders.desk(tmp_path_factory.mktemp("guarded"), [KIND])
    prune_into(folder / KIND, folder / "pruned", METHOD, RATIO, None)
    return folder


def test_a_folder_guards_the_server_that_loads_it_before_its_first_prompt(home):
    """Else what is wrong with one prompt of the first batch would end the others, too."""
    import mlx_vlm.server.runtime  # noqa: F401  (a server has it)
    from mlx_vlm.server.generation import ResponseGenerator

    server = ResponseGenerator(str(home / "pruned"))
    try:
        server.wait_until_ready()
        assert EMBED in vars(server)
        refused = {"input_ids": mx.array([[3, 4]]), "position_ids": mx.array([[0, 1]])}
        ids, more = server._gpu_embed(refused)  # which would have raised in the thread of all
        assert more == {}
        with pytest.raises(UserError, match="leave out position_ids"):
            ids.squeeze(0)
        with pytest.raises(UserError, match="leave out position_ids"):
            ids.shape  # noqa: B018  (whatever a later version does first)
    finally:
        server.stop_and_join()


@pytest.mark.parametrize("use", [len, bool, iter, list, lambda ids: ids[0], lambda ids: ids.shape])
def test_ids_of_a_refused_prompt_say_why(use):
    with pytest.raises(UserError, match="no such budget"):
        use(RefusedIds(UserError("no such budget")))


def test_a_server_that_cannot_be_guarded_is_told_of_once(home, monkeypatch, caplog):
    from mlx_vlm import apply_chat_template
    from mlx_vlm import generate as theirs
    from mlx_vlm.server.runtime import runtime

    model, processor = load(home / KIND)
    monkeypatch.setattr(runtime, "response_generator", SimpleNamespace(model=model))
    picture = str(home / "a.png")
    text = apply_chat_template(processor, model.config, "w7", num_images=1)
    with pruned(model, METHOD, keep_ratio=RATIO):
        for _ in range(2):
            theirs(model, processor, text, picture, max_tokens=1, temperature=0.0)
    (record,) = [record for record in caplog.records if record.name == "mlx_vlm_prune"]
    assert "this version of mlx-vlm's server has no _gpu_embed" in record.message
