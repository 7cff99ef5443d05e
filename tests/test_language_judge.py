"""A language model's grades: asked for as the authors ask, kept, and refused in one sentence."""

import pytest

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.evaluation.language_judge import LanguageJudge
from mlx_vlm_prune.evaluation.questions import Question, mmvet

from .judge_server import completion, judge_server

QUESTION = Question("v1_0", "What?", ("red",), b"", scoring_data=("What?", "red<OR>crimson"))


@pytest.fixture(autouse=True)
def _direct(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def judge(url, tmp_path, model="grader") -> LanguageJudge:
    grader = LanguageJudge(mmvet, url, model, tmp_path / "g.jsonl")
    grader.pause = lambda seconds: None
    return grader


def test_a_grade_is_asked_for_as_published_and_only_once(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with judge_server(lambda body: completion("0.7")) as (url, requests):
        first = judge(url + "/", tmp_path)
        assert [first(QUESTION, "red"), first(QUESTION, "red")] == [0.7, 0.7]
        assert judge(url, tmp_path)(QUESTION, "red") == 0.7, "read from the file"
        (request,) = requests
        assert request == {
            "model": "grader", "max_tokens": 3, "temperature": 0.0, "key": "Bearer secret",
            "path": "/v1/chat/completions",
            "messages": [{"role": "user", "content": mmvet.grade_prompt(QUESTION, "red")}],
        }  # fmt: skip
        assert "What? | red <OR> crimson | red | " in request["messages"][0]["content"]
        judge(url, tmp_path, "another")(QUESTION, "red")
        first(QUESTION, "blue")
        assert len(requests) == 3, "another model and another response are graded again"


def test_what_is_no_grade_is_asked_again_at_a_rising_temperature(tmp_path):
    replies = iter(["good", "well", "1.5", "", "0.4"])
    with judge_server(lambda body: completion(next(replies))) as (url, requests):
        assert judge(url, tmp_path)(QUESTION, "red") == 0.4
    assert [request["temperature"] for request in requests] == [0.0, 0.0, 0.5, 1.0, 1.5]
    endings = [r["messages"][0]["content"].endswith("(digit): ") for r in requests]
    assert endings == [False, True, True, True, True]
    with judge_server(lambda body: completion("no idea")) as (url, requests):
        assert judge(url, tmp_path)(QUESTION, "blue") == 0.0
    assert len(requests) == 5


def test_a_busy_server_is_asked_again(tmp_path):
    codes = iter([429, 503, 200])
    with judge_server(lambda body: (next(codes), completion("1.0")[1])) as (url, requests):
        assert judge(url, tmp_path)(QUESTION, "red") == 1.0
    assert len(requests) == 3


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ((404, {"error": "no such\nmodel"}), 'refused: 404 Not Found, {"error": "no such'),
        ((429, {}), "refused: 429"),
        ((200, b"<html>"), "sent no chat completion"),
        ((200, {"choices": []}), "sent no chat completion"),
    ],
)
def test_a_server_that_does_not_grade_is_named_in_one_sentence(reply, why, tmp_path):
    with judge_server(lambda body: reply) as (url, _):
        with pytest.raises(UserError, match=why) as refused:
            judge(url, tmp_path)(QUESTION, "red")
        assert url in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(UserError, match="does not answer"):
        judge(url, tmp_path)(QUESTION, "red")
    for wrong in ("127.0.0.1:80", "ftp://x", "http://"):
        with pytest.raises(UserError, match="judge_url is"):
            judge(wrong, tmp_path)


def test_a_grade_that_was_cut_off_is_asked_for_again(tmp_path):
    with judge_server(lambda body: completion("0.5")) as (url, requests):
        judge(url, tmp_path)(QUESTION, "red")
        kept = tmp_path / "g.jsonl"
        kept.write_bytes(kept.read_bytes()[:-9])
        assert judge(url, tmp_path)(QUESTION, "red") == 0.5
        assert len(requests) == 2
        assert judge(url, tmp_path)(QUESTION, "red") == 0.5
        assert len(requests) == 2
        kept.write_text("[]\n")
        with pytest.raises(UserError, match=r"g\.jsonl, line 1: this is no grade"):
            judge(url, tmp_path)
