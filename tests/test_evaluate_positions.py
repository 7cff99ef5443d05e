"""Both policies of positions measured by one `python -m mlx_vlm_prune.evaluate`."""

from mlx_vlm_prune.machine.user_cache import cache_folder

from . import test_evaluate
from .test_evaluate import SPECS, run

_cache, home = test_evaluate._cache, test_evaluate.home  # fixtures


def test_positions_are_kept_or_counted_on_in_one_run(home, tmp_path, capsys):
    both = ["--positions", "keep", "--positions", "renumber", "--keep-tokens", "5"]
    result = run(home, tmp_path / "e.json", *both)
    rows = {(row["pruner"], row.get("positions")): row for row in result["rows"]}
    names = {"random", *SPECS} - {"fastv"}
    assert rows.keys() == {("none", None)} | {(n, p) for n in names for p in ("keep", "renumber")}
    logprobs = {policy: rows["norm", policy]["logprob"] for policy in ("keep", "renumber")}
    assert logprobs["keep"] != logprobs["renumber"]
    for policy, logprob in logprobs.items():
        alone = run(home, tmp_path / f"{policy}.json", "--positions", policy, "--keep-tokens", "5")
        row = next(row for row in alone["rows"] if row["pruner"] == "norm")
        assert (row["logprob"], row["positions"]) == (logprob, policy)
        assert row["to_random"] == rows["norm", policy]["to_random"]
    assert len(result["refused"]) == 1
    assert "norm renumber" in capsys.readouterr().out
    assert not (cache_folder() / "evaluations").exists()
