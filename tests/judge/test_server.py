"""Models behind a server: what it may cost, what it keeps, and servers that misbehave."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest

from dpo_kit.config.building import ServerAnswers
from dpo_kit.config.settings import Endpoint
from dpo_kit.errors import ConfigError, DataError, ModelError
from dpo_kit.judge.answers import Asking, draw_answers
from dpo_kit.judge.server import Request, Server
from dpo_kit.run.journal import Journal, key_of
from tests.scripted_server import Turn, scripted_server

QUICK = {"Retry-After-Ms": "5"}  # what the official client obeys before Retry-After


def requests(count, text="question {}"):
    return [Request(str(i), [{"role": "user", "content": text.format(i)}], 8, 0.0) for i in range(count)]


def endpoint(base_url, **options):
    return Endpoint(**{"base_url": base_url, "model": "m", "retries": 3, **options})


def ask(tmp_path, server, count, **options):
    with Journal(tmp_path / "replies.jsonl") as journal:
        client = Server(endpoint(server.base_url, **options), journal)
        return client.ask(requests(count), "asking"), client.spend()


def echo(number, body):
    return Turn(f"reply to {body['messages'][0]['content']}")


def test_tools_and_template_arguments_go_with_a_prompt_and_calls_come_back(tmp_path):
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "York"}'}}
    asked = [
        {"role": "user", "content": "Rain?", "tools": [tool], "chat_template_kwargs": {"enable_thinking": False}},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call | {"function": {"name": "weather", "arguments": {}}}],
        },
        {"role": "tool", "content": "wet"},
    ]
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    reply = {"id": "1", "object": "chat.completion", "created": 1, "model": "m",
             "choices": [{"index": 0, "finish_reason": "tool_calls", "message": message}]}  # fmt: skip
    with scripted_server(lambda *_: Turn(raw=json.dumps(reply).encode())) as server, Journal(tmp_path / "j") as journal:
        source = ServerAnswers(base_url=server.base_url, model="m", temperatures=[1.0], draws=1)
        ((answer,),), _ = draw_answers(source, None, [asked], Asking(8), journal)
    (body,) = server.bodies
    assert (body["tools"], body["chat_template_kwargs"]) == ([tool], {"enable_thinking": False})
    assert body["messages"][0] == {"role": "user", "content": "Rain?"}
    assert body["messages"][1]["tool_calls"][0]["function"]["arguments"] == "{}"  # JSON text, as servers want it
    assert answer.text == '{"arguments": {"town": "York"}, "name": "weather"}'
    (said,) = answer.in_form_of(asked)
    assert said["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"town": "York"}}


# --- the journal -------------------------------------------------------------------------------------------------


@pytest.mark.fault("a line cut off by a kill", promise="P4")
def test_a_journal_that_was_cut_anywhere_keeps_every_complete_row(tmp_path):
    file = tmp_path / "rows.jsonl"
    with Journal(file) as journal:
        for i in range(3):
            journal.add(f"k{i}", {"text": f"ü\n{i}"})
    whole = file.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        file.write_bytes(whole[:cut])
        with Journal(file) as journal:
            assert len(journal.rows) == sum(end <= cut for end in ends)
            for i in range(3):
                journal.add(f"k{i}", {"text": f"ü\n{i}"})
        assert file.read_bytes() == whole


@pytest.mark.fault("two processes in one file", promise="P6")
def test_a_journal_has_one_process_at_a_time(tmp_path):
    hold = "import sys, time; from pathlib import Path; from dpo_kit.run.journal import Journal\n"
    hold += "held = Journal(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "rows.jsonl")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=r"rows\.jsonl is being written by another process"):
        Journal(tmp_path / "rows.jsonl")
    holder.kill()
    holder.communicate()
    Journal(tmp_path / "rows.jsonl").close()


def test_a_damaged_line_is_named_with_its_number(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"key": "a"}\nnot json\n{"key": "b"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2 is damaged"):
        Journal(tmp_path / "rows.jsonl")


@pytest.mark.fault("disk full", promise="P4")
def test_a_full_disk_leaves_only_whole_rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Journal(file) as journal:
        journal.add("first", {"text": "x" * 50})
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 40, hard))
        try:
            with pytest.raises(OSError):
                journal.add("second", {"text": "y" * 100})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
        journal.add("third", {"text": "z"})
    assert [json.loads(line)["key"] for line in file.read_text().splitlines()] == ["first", "third"]


# --- asking ------------------------------------------------------------------------------------------------------


def test_replies_come_in_the_order_of_the_requests_and_are_asked_for_once(tmp_path):
    def slow_first(number, body):
        return Turn(f"reply to {body['messages'][0]['content']}", seconds=random.Random(number).random() / 20)

    with scripted_server(slow_first) as server:
        replies, spend = ask(tmp_path, server, 12)
        again, _ = ask(tmp_path, server, 12)
    assert [reply.text for reply in replies] == [f"reply to question {i}" for i in range(12)]
    assert again == replies and len(server.bodies) == 12
    assert (spend["replies"], spend["prompt_tokens"], spend["completion_tokens"]) == (12, 120, 24)


def test_what_is_sent_is_what_was_asked(tmp_path):
    with scripted_server(echo) as server, Journal(tmp_path / "replies.jsonl") as journal:
        one = Request("k", [{"role": "user", "content": "hi"}], 7, None, seed=3)
        Server(endpoint(server.base_url, limit_field="max_completion_tokens"), journal).ask([one], "asking")
    sent = {"model": "m", "messages": one.messages, "max_completion_tokens": 7, "seed": 3}
    assert server.bodies == [sent]


def test_a_cut_reply_says_so(tmp_path):
    with scripted_server(lambda *_: Turn("a", finish_reason="length")) as server:
        replies, _ = ask(tmp_path, server, 1)
    assert replies[0].cut


def test_a_reply_that_was_filtered_is_empty_and_not_paid_again(tmp_path):
    filtered = b'{"choices": [{"message": {"content": null}, "finish_reason": "content_filter"}]}'
    with scripted_server(lambda *_: Turn(raw=filtered)) as server:
        replies, _ = ask(tmp_path, server, 1)
    assert replies[0].text == "" and len(server.bodies) == 1


def test_half_a_surrogate_pair_in_a_reply_does_not_break_the_file(tmp_path):
    with scripted_server(lambda *_: Turn("a\ud800b")) as server:
        replies, _ = ask(tmp_path, server, 1)
    assert replies[0].text == "a?b"


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Turn(status=429, raw=b"{}", headers=QUICK), id="429"),
        pytest.param(Turn(status=500, raw=b"oops", headers=QUICK), id="500"),
        pytest.param(Turn(seconds=3), id="timeout"),
        pytest.param(Turn(raw=b"<html>busy</html>", headers={"Content-Type": "text/html"}), id="html"),
        pytest.param(Turn(raw=b'{"choices": [{"mess'), id="cut json"),
        pytest.param(Turn(raw=b'{"choices": []}'), id="no choices"),
        pytest.param(Turn(raw=b'{"choices": [{"message": {"content": null}}]}'), id="no content"),
        pytest.param(Turn(raw=b"[1, 2]"), id="a list"),
    ],
)
@pytest.mark.fault("a server that returns 429, 500, time-outs, garbage", promise="P4")
def test_a_server_that_misbehaves_once_is_asked_again(tmp_path, fault):
    with scripted_server(lambda number, body: fault if number == 0 else echo(number, body)) as server:
        replies, spend = ask(tmp_path, server, 2, workers=1, timeout_s=0.5)
    assert [reply.text for reply in replies] == ["reply to question 0", "reply to question 1"]
    assert len(server.bodies) == 3 and spend["retried"] == 1 and spend["failed"] == {}


def test_retry_after_is_obeyed(tmp_path):
    busy = Turn(status=429, raw=b"{}", headers={"Retry-After": "1"})
    with scripted_server(lambda number, body: busy if number == 0 else echo(number, body)) as server:
        since = time.monotonic()
        ask(tmp_path, server, 1)
        assert time.monotonic() - since >= 1
    assert len(server.bodies) == 2


@pytest.mark.fault("a server that stays broken", promise="P4")
def test_a_broken_server_is_left_alone_and_the_rest_asked_the_next_time(tmp_path):
    broken = Turn(status=500, raw=b"{}", headers=QUICK)
    with scripted_server(lambda number, body: broken if number >= 3 else echo(number, body)) as server:
        replies, spend = ask(tmp_path, server, 40, workers=1, retries=1)
    assert [reply is not None for reply in replies] == [True] * 3 + [False] * 37
    assert len(server.bodies) == 3 + 5 * 2
    assert spend["failed"] == {"InternalServerError": 5, "not asked: 5 requests failed one after the other": 32}
    with scripted_server(echo) as server:
        replies, _ = ask(tmp_path, server, 40)
    assert all(replies) and len(server.bodies) == 37


def test_a_key_or_a_model_that_is_refused_stops_at_once(tmp_path):
    for status, remedy in ((401, "put a valid key into"), (404, "knows a model of that name")):
        with scripted_server(lambda *_, s=status: Turn(status=s, raw=b"{}")) as server:
            with pytest.raises(ModelError, match=remedy):
                ask(tmp_path, server, 30, workers=1)
            assert len(server.bodies) <= 2


# --- keys and cost -----------------------------------------------------------------------------------------------


def test_the_key_comes_from_the_environment_and_is_written_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-the-users-other-key")
    monkeypatch.setenv("LAB_KEY", "canary-of-the-lab")
    with scripted_server(echo) as server:
        ask(tmp_path, server, 1, api_key_env="LAB_KEY")
        assert server.headers[0]["authorization"] == "Bearer canary-of-the-lab"
    with scripted_server(echo) as server:  # another server never gets the key of the official one
        ask(tmp_path / "other", server, 1)
        assert "the-users-other-key" not in json.dumps(server.headers)
    assert "canary" not in "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file())


def test_a_missing_key_is_refused_with_the_name_of_its_variable(tmp_path):
    with Journal(tmp_path / "r.jsonl") as journal, pytest.raises(ConfigError, match="api_key_env=NOT_THERE_AT_ALL"):
        Server(endpoint("http://127.0.0.1:9/v1", api_key_env="NOT_THERE_AT_ALL"), journal)


def test_cost_is_tokens_times_price_and_never_goes_above_its_limit(tmp_path):
    """100 tokens in at 2 a million and 8 out at 5 a million are 2.4e-4; so is what a request may take at most."""
    usage = {"prompt_tokens": 100, "completion_tokens": 8}
    priced = {"price_in": 2.0, "price_out": 5.0, "max_cost": 1.3e-3}
    with scripted_server(lambda *_: Turn("x", usage=usage)) as server:
        with Journal(tmp_path / "r.jsonl") as journal:
            client = Server(endpoint(server.base_url, **priced), journal)
            replies = client.ask(requests(20, "q" * 300), "asking")
            assert client.spend()["cost"] == pytest.approx(5 * 2.4e-4)
        with Journal(tmp_path / "r.jsonl") as journal:  # what was spent before counts after a new start
            client = Server(endpoint(server.base_url, **priced), journal)
            assert sum(map(bool, client.ask(requests(20, "q" * 300), "asking"))) == 5
            assert client.spend()["failed"] == {"not asked: max_cost=0.0013 is reached": 15}
    assert sum(map(bool, replies)) == 5 == len(server.bodies)


def test_a_request_that_would_just_reach_the_limit_of_cost_is_made(tmp_path):
    """8 tokens out at 125,000 a million are 1: a limit of 3 is for three requests, one after the other or at once."""
    usage = {"prompt_tokens": 0, "completion_tokens": 8}
    for workers in (1, 4):
        with scripted_server(lambda *_: Turn("x", usage=usage)) as server:
            options = {"price_out": 125_000, "max_cost": 3, "workers": workers}
            replies, spend = ask(tmp_path / str(workers), server, 9, **options)
        assert sum(map(bool, replies)) == len(server.bodies) == 3 and spend["cost"] == 3


def test_tokens_that_the_server_does_not_count_are_estimated(tmp_path):
    with scripted_server(lambda *_: Turn("y" * 30, usage=None)) as server:
        _, spend = ask(tmp_path, server, 1, price_in=1.0)
    assert (spend["prompt_tokens"], spend["completion_tokens"]) == (len("question 0") // 3, 10) and spend["cost"] > 0


def test_the_number_of_requests_has_a_limit_too(tmp_path):
    with scripted_server(echo) as server:
        replies, spend = ask(tmp_path, server, 9, max_requests=4)
        assert len(server.bodies) == 4 and sum(map(bool, replies)) == 4
        assert spend["failed"] == {"not asked: max_requests=4 is reached": 5}


# --- kills -------------------------------------------------------------------------------------------------------

KILLED = """
import sys; from pathlib import Path
from dpo_kit.run.journal import Journal
from tests.judge.test_server import endpoint, requests
from dpo_kit.judge.server import Server
with Journal(Path(sys.argv[1])) as journal:
    Server(endpoint(sys.argv[2], workers=3), journal).ask(requests(60), "asking")
"""


@pytest.mark.fault("SIGKILL while a server is asked", promise="P4")
def test_a_killed_pass_asks_only_for_what_it_had_not_got(tmp_path):
    file = tmp_path / "replies.jsonl"
    with scripted_server(lambda number, body: Turn("fine", seconds=0.02)) as server:
        command = [sys.executable, "-c", KILLED, str(file), server.base_url]
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
        while process.poll() is None and sum(server.answered.values()) < 25:
            time.sleep(0.01)
        process.kill()
        process.wait()
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    keys = [json.loads(line)["key"] for line in file.read_text().splitlines()]
    assert sorted(keys, key=int) == [str(i) for i in range(60)]
    assert len(server.answered) == 60 and sum(server.answered.values()) <= 60 + 3  # three workers


def test_equal_parts_have_equal_keys_and_others_do_not():
    assert key_of("a", [1, {"x": 2, "y": 3}]) == key_of("a", [1, {"y": 3, "x": 2}])
    assert len({key_of("a", "b"), key_of("ab"), key_of(["a", "b"]), key_of("a", "b", None)}) == 4
