"""The client of served models, against a real server that is scripted to fail."""

import json
import logging
import subprocess
import sys
import threading

import httpx2
import openai
import pytest
from endpoint_server import SECRET, chat, completion, failure, serving
from hypothesis import given, settings
from hypothesis import strategies as st
from tenacity import RetryCallState

from kpig_fast import endpoint as endpoint_module
from kpig_fast.endpoint import Endpoint, RefusedError, _seconds_to_wait


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """No waiting between tries, and no settings of whoever runs the tests."""
    monkeypatch.setattr(endpoint_module, "_LONGEST_WAIT", 0.0)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def request(text):
    return {"messages": [{"role": "user", "content": text}], "temperature": 0}


def echo(_, body):
    return chat(body["messages"][-1]["content"].upper()) if "messages" in body else completion(body["prompt"].upper())


def in_turn(*replies):
    """The replies one after another, then the last one for ever."""
    return lambda number, _: replies[min(number, len(replies) - 1)]


def test_a_request_is_sent_as_the_protocol_says():
    with serving(echo) as server:
        assert Endpoint("small", server.url).answer([request("hello")]) == ["HELLO"]
        assert Endpoint("small", server.url).answer([{"prompt": "once", "max_tokens": 3}]) == ["ONCE"]
    assert server.paths == ["/v1/chat/completions", "/v1/completions"]
    assert server.bodies == [
        {"model": "small", **request("hello")},
        {"model": "small", "prompt": "once", "max_tokens": 3},
    ]
    assert server.keys == [f"Bearer {SECRET}"] * 2


def test_answers_come_in_the_order_of_the_requests_and_equal_ones_are_sent_once():
    texts = [f"text {n % 7}" for n in range(40)]
    with serving(echo) as server:
        assert Endpoint("m", server.url).answer([request(t) for t in texts]) == [t.upper() for t in texts]
        assert len(server.bodies) == 7
        assert Endpoint("m", server.url).answer([]) == []


def test_no_answer_text_is_an_empty_answer():
    with serving(in_turn(chat(None))) as server:
        assert Endpoint("m", server.url).answer([request("a")]) == [""]


def test_the_url_comes_from_the_environment_and_a_local_server_needs_no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with serving(echo) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        assert Endpoint("m").answer([request("a")]) == ["A"]
    assert SECRET not in server.keys[0]


def test_without_url_and_key_the_fix_is_named(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="set OPENAI_API_KEY, or give the base URL"):
        Endpoint("m").answer([request("a")])


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503])
def test_what_may_pass_is_tried_again(status):
    with serving(in_turn(failure(status, "later"), failure(status, "later"), chat("done"))) as server:
        assert Endpoint("m", server.url).answer([request("a")]) == ["done"]
    assert len(server.bodies) == 3


def test_it_gives_up_after_the_last_try():
    with serving(in_turn(failure(500, "broken inside"))) as server:
        message = r"model 'm' at http://127.0.0.1:\d+/v1/ answers 500 \(4 tries\): .*broken inside.*try again later"
        with pytest.raises(ConnectionError, match=message):
            Endpoint("m", server.url, tries=4).answer([request("a")])
    assert len(server.bodies) == 4


@pytest.mark.parametrize(
    ("reply", "kind", "fix"),
    [
        (failure(401, "wrong key"), ValueError, "401: .*wrong key.*; set OPENAI_API_KEY to a valid key"),
        (failure(403, "not you"), ValueError, "403: .*not you.*may use this model"),
        (failure(404, "no such model"), ValueError, "404: .*no such model.*often in /v1"),
        (failure(429, "no money", "insufficient_quota"), ValueError, "429: .*no money.*budget of the key is spent"),
        (failure(400, "prompt\n too long"), RefusedError, r"refuses a request \(400\): .*prompt too long"),
        (failure(422, "bad field"), RefusedError, r"refuses a request \(422\): .*bad field"),
    ],
)
def test_what_cannot_pass_is_one_sentence_with_the_fix_at_once(reply, kind, fix):
    with serving(in_turn(reply)) as server, pytest.raises(ValueError, match=fix) as raised:
        Endpoint("m", server.url).answer([request("a")])
    assert type(raised.value) is kind
    assert len(server.bodies) == 1
    assert "\n" not in str(raised.value)


def test_a_server_that_does_not_answer_in_time():
    done = threading.Event()

    def reply(_, __):
        done.wait(10)
        return chat("too late")

    with serving(reply) as server:
        with pytest.raises(ConnectionError, match=r"did not answer in time \(2 tries\)"):
            Endpoint("m", server.url, timeout=0.1, tries=2).answer([request("a")])
        done.set()
    assert len(server.bodies) == 2


def test_a_server_that_is_not_there():
    with serving(echo) as server:
        url = server.url
    with pytest.raises(ConnectionError, match=r"cannot be reached \(2 tries\); check the server and its base URL"):
        Endpoint("m", url, tries=2).answer([request("a")])


@pytest.mark.parametrize(
    "body", [b"<html>hello</html>", b"{", {}, {"choices": []}, {"choices": [{"message": None}]}, {"choices": None}, []]
)
def test_what_is_no_answer_of_the_protocol(body):
    with (
        serving(in_turn((200, body))) as server,
        pytest.raises(ValueError, match="no answer of the OpenAI protocol"),
    ):
        Endpoint("m", server.url, tries=1).answer([request("a")])


@pytest.mark.parametrize("concurrency", [1, 3])
def test_so_many_requests_are_under_way_at_once_and_no_more(concurrency):
    lock, all_here = threading.Lock(), threading.Barrier(concurrency)
    here, most = 0, 0

    def reply(_, body):
        nonlocal here, most
        with lock:
            here += 1
            most = max(most, here)
        all_here.wait(10)
        with lock:
            here -= 1
        return echo(_, body)

    texts = [f"t{n}" for n in range(3 * concurrency)]
    with serving(reply) as server:
        answers = Endpoint("m", server.url, concurrency=concurrency).answer([request(t) for t in texts])
    assert answers == [t.upper() for t in texts]
    assert most == concurrency


@pytest.mark.parametrize(("field", "value"), [("concurrency", 0), ("tries", 0), ("tries", -1)])
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}; give at least 1"):
        Endpoint("m", **{field: value})


def test_answers_are_kept_by_model_and_request(tmp_path):
    with serving(echo) as server:
        for model in ("one", "one", "two"):
            assert Endpoint(model, server.url, tmp_path).answer([request("a"), request("b")]) == ["A", "B"]
        assert len(server.bodies) == 4
        assert Endpoint("one", server.url, tmp_path).answer([{**request("a"), "temperature": 1}]) == ["A"]
        assert len(server.bodies) == 5
    assert len(list(tmp_path.iterdir())) == 5


def test_a_stopped_command_goes_on_where_it_stopped(tmp_path):
    requests = [request(f"t{n}") for n in range(10)]
    with serving(lambda number, body: echo(number, body) if number < 6 else failure(401, "revoked")) as server:
        with pytest.raises(ValueError, match="revoked"):
            Endpoint("m", server.url, tmp_path, concurrency=1).answer(requests)
        kept = len(list(tmp_path.iterdir()))
        assert kept == 6
        # The first refusal ends it: at most one more request was under way.
        assert len(server.bodies) <= 8
        sent = len(server.bodies)
        server.reply = echo
        assert Endpoint("m", server.url, tmp_path).answer(requests) == [f"T{n}" for n in range(10)]
        assert len(server.bodies) == sent + 4


def test_only_what_is_worth_it_is_kept(tmp_path):
    with serving(echo) as server:
        for _ in range(2):
            Endpoint("m", server.url, tmp_path).answer([request("a"), request("b")], keep=lambda answer: answer == "A")
        assert [body["messages"][0]["content"] for body in server.bodies[2:]] == ["b"]


@settings(max_examples=20, deadline=None)
@given(text=st.text(st.characters(codec="utf-8")))
def test_any_answer_is_read_as_it_was_kept(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("cache")
    with serving(in_turn(chat(text))) as server:
        for _ in range(2):
            assert Endpoint("m", server.url, folder).answer([request("a")]) == [text]
    assert len(server.bodies) == 1


def test_an_answer_half_written_is_not_read(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with serving(echo) as server:
        with monkeypatch.context() as patch:
            patch.setattr("os.replace", stop)
            with pytest.raises(KeyboardInterrupt):
                Endpoint("m", server.url, tmp_path).answer([request("a")])
        assert Endpoint("m", server.url, tmp_path).answer([request("a")]) == ["A"]
        assert len(server.bodies) == 2


def test_progress_is_shown_on_request(capsys):
    with serving(echo) as server:
        Endpoint("m", server.url).answer([request("a"), request("b")], progress=True, what="judging")
        assert "judging: 100%" in capsys.readouterr().err
        Endpoint("m", server.url).answer([request("a")])
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("status", [200, 400, 401, 404, 429, 500])
def test_the_key_is_nowhere(tmp_path, caplog, capsys, status):
    caplog.set_level(logging.DEBUG)
    # Servers have been seen to say which key they did not like.
    with serving(in_turn(failure(status, f"key {SECRET} is odd"))) as server:
        endpoint = Endpoint("m", server.url, tmp_path, tries=2)
        with pytest.raises((ValueError, ConnectionError)) as raised:
            endpoint.answer([request("a")], progress=True)
        assert SECRET not in str(raised.value)
        assert raised.value.__suppress_context__ or raised.value.__context__ is None
        server.reply = echo
        assert endpoint.answer([request("a")]) == ["A"]
    shown = capsys.readouterr()
    assert SECRET not in repr(endpoint) + caplog.text + shown.out + shown.err
    assert all(SECRET.encode() not in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


@pytest.mark.parametrize("url", [f"http://user:{SECRET}@here/v1", f"http://here/v1?token={SECRET}"])
def test_a_secret_in_the_address_is_refused_unseen(monkeypatch, url):
    with pytest.raises(ValueError, match="set OPENAI_API_KEY instead") as raised:
        Endpoint("m", url)
    assert SECRET not in str(raised.value)
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    with pytest.raises(ValueError, match="a user or a query"):
        Endpoint("m")


def state_of(error):
    """A retry after ``error``."""
    state = RetryCallState(None, None, (), {})
    state.set_exception((type(error), error, None))
    return state


def rate_limited(**headers):
    call = httpx2.Request("POST", "http://here/v1")
    return openai.RateLimitError("slow", response=httpx2.Response(429, request=call, headers=headers), body=None)


def test_it_waits_as_long_as_the_server_asks_or_longer_each_time(monkeypatch):
    monkeypatch.setattr(endpoint_module, "_LONGEST_WAIT", 60.0)
    assert _seconds_to_wait(state_of(rate_limited(**{"retry-after": "7"}))) == 7
    assert _seconds_to_wait(state_of(rate_limited(**{"retry-after": "7000"}))) == 60
    state = state_of(rate_limited())
    for attempt, most in ((1, 1), (3, 4), (6, 32), (12, 60)):
        state.attempt_number = attempt
        assert all(0 <= _seconds_to_wait(state) <= most for _ in range(50))
    assert max(_seconds_to_wait(state) for _ in range(50)) > 30


def test_the_module_needs_the_library_only_when_it_asks():
    code = (
        "import sys; from kpig_fast.endpoint import Endpoint; Endpoint('m');"
        "assert not {'openai', 'tenacity', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'kpig-fast\[annotate\]'"):
        Endpoint("m", "http://127.0.0.1:9/v1").answer([request("a")])


def test_a_request_is_known_by_its_content_whatever_the_order_of_its_fields(tmp_path):
    with serving(echo) as server:
        asked = Endpoint("m", server.url, tmp_path)
        asked.answer([request("a")])
        assert asked.answer([json.loads(json.dumps(dict(reversed(request("a").items()))))]) == ["A"]
        assert len(server.bodies) == 1
