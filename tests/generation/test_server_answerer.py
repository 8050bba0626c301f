"""Answerer server: against a stub that errs on demand, and against a real `transformers serve`."""

import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import byte_tokenizer, tiny_backbone
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config import load
from pipeline.errors import UserError
from pipeline.generation.answerers import server
from pipeline.generation.answerers.interface import Answer, Question, Sampling
from pipeline.generation.answerers.server import Servers
from pipeline.generation.responses import Responses, rows_of
from pipeline.runs.folder import RunDir
from pipeline.stages import generate

END = 256
TOKENIZER = byte_tokenizer()
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PROBE, REAL = server.PROBE_TOKENS, 40
"""max_tokens of a request that only tries the server out, and of the tests' questions."""


# ---- a server of our own

Reply = Callable[["Stub", dict[str, Any]], Any]
"""A JSON reply; or (status, reply, headers); or bytes, sent as they are; or None: the connection is cut."""


class Stub:
    """An HTTP server in a thread; `reply` decides what a question gets, by default what vLLM would say."""

    def __init__(self, reply: Reply | None = None, models: tuple[str, ...] = ("stub",)):
        self.reply, self.models = reply or (lambda stub, body: vllm(body)), models
        self.bodies: list[dict[str, Any]] = []
        """Of the questions, without those that only try the server out."""
        self.headers: list[dict[str, str]] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self._send({"data": [{"id": name} for name in stub.models]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.headers.append(dict(self.headers))
                if body["max_tokens"] == PROBE:
                    self._send(stub.probed(body | {"path": self.path}))
                else:
                    stub.bodies.append(body | {"path": self.path})
                    self._send(stub.reply(stub, stub.bodies[-1]))

            def _send(self, reply):
                if reply is None:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                status, reply, headers = reply if isinstance(reply, tuple) else (200, reply, {})
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args):  # a client that has gone away is what some tests are about
                pass

        self.http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def probed(self, body: dict[str, Any]) -> Any:
        return vllm(body)

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.close()


def ids_for(prompt: list[int]) -> list[int]:
    return [prompt[0], prompt[-1], sum(prompt) % 94, END]


def vllm(body: dict[str, Any], **changed: Any) -> dict[str, Any]:
    prompt = body["prompt"]
    choice = {
        "index": 0,
        "text": TOKENIZER.decode(ids_for(prompt), skip_special_tokens=True),
        "finish_reason": "stop",
        "token_ids": ids_for(prompt),
        "prompt_token_ids": prompt,
    }
    usage = {"prompt_tokens": len(prompt), "completion_tokens": 4}
    return {"choices": [choice | {k: v for k, v in changed.items() if k not in usage}]} | {
        "usage": usage | {k: v for k, v in changed.items() if k in usage}
    }


def questions(count: int, temperature: float = 0.0) -> list[Question]:
    texts = [f"question {i}" for i in range(count)]
    return [Question(TOKENIZER(text)["input_ids"], [text], temperature) for text in texts]


def expected(asked: list[Question]) -> list[Answer]:
    return [Answer(ids_for(q.ids), finished=True, exact=True) for q in asked]


def answerer_of(
    *stubs: Stub | str, words: tuple[str, ...] = (), chat_template: bool = False, tokenizer=TOKENIZER, ends=None
):
    urls = ",".join(s if isinstance(s, str) else s.url for s in stubs)
    config = load(None, [f"machine.servers=[{urls}]", "generate.temperatures=[0.0]", *words])
    return Servers(
        config.machine,
        tokenizer,
        [END] if ends is None else ends,
        chat_template=chat_template,
        draws=any(config.generate.temperatures),
    )


def sampling(batch_size: int = 4) -> Sampling:
    return Sampling(REAL, 0.9, batch_size, seed=100)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(server, "FIRST_PAUSE", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


# ---- what is asked


def test_ids_go_out_and_come_back_with_every_setting_of_the_checkpoint_overruled():
    with Stub() as stub:
        asked = questions(3, temperature=0.7)
        assert answerer_of(stub).answer(asked, sampling(1)) == expected(asked)
        assert stub.bodies[2] == {
            "path": "/v1/completions",
            "model": "stub",
            "prompt": asked[2].ids,
            "max_tokens": REAL,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": 102,
            "stop_token_ids": [END],
            "return_token_ids": True,
        }
        assert "Authorization" not in stub.headers[0]


def test_a_backbone_without_end_tokens_is_answered_to_the_full_length():
    with Stub() as stub:
        answerer_of(stub, ends=[]).answer(questions(1), sampling())
        assert stub.bodies[0]["ignore_eos"] is True
        assert "stop_token_ids" not in stub.bodies[0]


def test_answers_keep_the_order_of_the_questions_and_all_are_reported():
    def reply(stub, body):
        time.sleep(random.Random(sum(body["prompt"])).random() / 50)
        return vllm(body)

    with Stub(reply) as one, Stub(reply) as other:
        asked, told = questions(40), []
        found = answerer_of(one, other).answer(asked, sampling(8), lambda *counts: told.append(counts))
        assert found == expected(asked)
        assert told == [(1, 4)] * 40
        assert len(one.bodies) + len(other.bodies) == 40
        assert one.bodies and other.bodies


def test_batch_size_questions_are_in_flight_over_all_servers():
    full = threading.Barrier(6)  # breaks, and the answer is an error, unless six are there at once

    def reply(stub, body):
        full.wait(timeout=20)
        return vllm(body)

    with Stub(reply) as one, Stub(reply) as other:
        asked = questions(12)
        assert answerer_of(one, other).answer(asked, sampling(6)) == expected(asked)
        assert (len(one.bodies), len(other.bodies)) == (6, 6)


def test_a_server_is_greeted_once_for_many_calls():
    with Stub() as stub:
        answerer = answerer_of(stub)
        for _ in range(3):
            answerer.answer(questions(2), sampling())
        assert answerer.answer([], sampling()) == []
        assert len(stub.headers) - len(stub.bodies) == 1


def test_the_key_of_the_environment_is_sent_and_never_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    refusal = (401, {"error": {"message": "wrong key sk-secret"}}, {})
    with Stub(lambda stub, body: refusal) as stub, pytest.raises(UserError, match="OPENAI_API_KEY") as error:
        answerer_of(stub).answer(questions(1), sampling())
    assert stub.headers[0]["Authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in str(error.value)
    assert "wrong key ***" in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\nsecret")
    with pytest.raises(UserError, match="OPENAI_API_KEY") as error:
        answerer_of(stub)
    assert "secret" not in str(error.value)


# ---- what goes wrong and is mended


@pytest.mark.parametrize(
    "mishap",
    [
        (500, {"error": "out of order"}, {}),
        (503, b"<html>loading</html>", {}),
        (429, {"error": {"message": "slower"}}, {"Retry-After": "0.01"}),
        (429, b"", {"Retry-After": "Sat, 21 Nov 2026 17:00:00 GMT"}),
        b"garbage",
        {"choices": []},
        {"choices": [{"finish_reason": "stop", "text": "no usage"}]},
        [1, 2],
        None,
    ],
    ids=["500", "503", "429", "429 until a date", "no JSON", "no choice", "no usage", "a list", "cut"],
)
def test_a_question_that_fails_twice_is_asked_a_third_time(mishap):
    def reply(stub, body):
        fails = body["prompt"] == asked[1].ids and sum(b["prompt"] == body["prompt"] for b in stub.bodies) <= 2
        return mishap if fails else vllm(body)

    with Stub(reply) as stub:
        asked = questions(4)
        assert answerer_of(stub).answer(asked, sampling(1)) == expected(asked)
        assert [b["prompt"] for b in stub.bodies] == [asked[i].ids for i in (0, 1, 1, 1, 2, 3)]


def test_a_server_that_hangs_is_left_and_the_question_asked_again():
    hanging = threading.Event()

    def reply(stub, body):
        if len(stub.bodies) == 1:
            hanging.wait(30)
        return vllm(body)

    with Stub(reply) as stub:
        asked = questions(3)
        assert answerer_of(stub, words=("machine.server_timeout=0.5",)).answer(asked, sampling(1)) == expected(asked)
        assert len(stub.bodies) == 4
        hanging.set()


def test_one_of_two_servers_is_dead_from_the_start():
    with Stub() as stub:
        asked = questions(20)
        assert answerer_of(f"http://127.0.0.1:{free_port()}/v1", stub).answer(asked, sampling()) == expected(asked)
        assert len(stub.bodies) == 20


def test_a_server_that_errs_at_everything_takes_no_question_with_it():
    def slowly(stub, body):
        time.sleep(0.02)
        return vllm(body)

    with Stub(lambda stub, body: (500, {"error": "always"}, {})) as one, Stub(slowly) as other:
        asked = questions(40)
        assert answerer_of(one, other).answer(asked, sampling(2)) == expected(asked)
        assert len(other.bodies) == 40


def test_one_of_two_servers_dies_in_the_middle_and_another_comes_to_its_place(tmp_path):
    def dies(stub, body):
        if len(stub.bodies) >= 3:
            stub.http.socket.close()
            return None
        return vllm(body)

    with Stub(dies) as one, Stub() as other:
        answerer, asked = answerer_of(one, other), questions(30)
        assert answerer.answer(asked, sampling()) == expected(asked)
        assert answerer.servers[0].way is None, "what comes back there has to be greeted"


def test_pauses_double_up_to_a_minute_and_respect_the_server(monkeypatch):
    monkeypatch.setattr(server, "FIRST_PAUSE", 0.5)
    monkeypatch.setattr(random, "uniform", lambda low, high: (low + high) / 2)
    paused = [server._pause(server._Endpoint("", failures=n)) for n in range(1, 10)]
    assert paused == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]
    assert server._pause(server._Endpoint("", failures=1, pause_it_wants=7)) == 7
    assert server._pause(server._Endpoint("", failures=1, pause_it_wants=7000)) == 60


# ---- what goes wrong and stays so


def _error(answerer: Servers, asked: list[Question] | None = None) -> str:
    with pytest.raises(UserError) as error:
        answerer.answer(asked or questions(6), sampling())
    return str(error.value)


def test_dead_servers_end_the_stage_with_what_each_said():
    dead = f"http://127.0.0.1:{free_port()}/v1"
    with Stub(lambda stub, body: (500, {"error": {"message": "out of memory\nsecond line"}}, {})) as stub:
        said = _error(answerer_of(dead, stub))
    assert f"{dead}: no connection" in said
    assert f"{stub.url}: out of memory" in said
    assert "second line" not in said
    assert "kept" in said


def test_servers_that_hang_end_the_stage_after_three_timeouts():
    hanging = threading.Event()
    with Stub(lambda stub, body: hanging.wait(30)) as stub:
        said = _error(answerer_of(stub, words=("machine.server_timeout=0.2",)), questions(2))
        hanging.set()
    assert "nothing within 0.2 s" in said
    assert "Raise machine.server_timeout=0.2 or lower generate.batch_size" in said
    assert len(stub.bodies) == 2 + 1 + 1, "two at first, then one at a time"


def test_a_question_that_no_server_answers_ends_the_stage():
    def reply(stub, body):
        return (500, {"error": "assertion"}, {}) if body["prompt"] == asked[3].ids else vllm(body)

    with Stub(reply) as one, Stub(reply) as other:
        asked = questions(200)
        said = _error(answerer_of(one, other), asked)
    assert "question 4 of 200" in said
    assert "assertion" in said


@pytest.mark.parametrize(
    ("status", "remedy"), [(400, "machine.server_api"), (404, "end in /v1"), (403, "OPENAI_API_KEY"), (302, "302")]
)
def test_a_refusal_is_told_at_once(status, remedy):
    with Stub(lambda stub, body: (status, {"error": {"message": "no such thing"}}, {})) as stub:
        said = _error(answerer_of(stub), questions(1))
    assert "no such thing" in said
    assert remedy in said
    assert len(stub.bodies) == 1


@pytest.mark.parametrize("changed", [{"prompt_tokens": 3}, {"prompt_token_ids": [1, 2, 3]}])
def test_another_tokenizer_or_template_is_told(changed):
    with Stub(lambda stub, body: vllm(body, **changed)) as stub:
        said = _error(answerer_of(stub))
    assert "has 10 for this backbone" in said
    assert "another" in said


def test_another_model_behind_the_server_shows_in_its_words():
    with Stub() as stub:
        stub.probed = lambda body: vllm(body, text="Hello")
        assert "'Hello'" in _error(answerer_of(stub))
        assert not stub.bodies


def test_no_question_is_asked_until_it_is_clear_which_model():
    with Stub(models=("one", "two")) as stub:
        assert "lists one, two" in _error(answerer_of(stub))
        asked = questions(1)
        assert answerer_of(stub, words=("machine.server_model=two",)).answer(asked, sampling()) == expected(asked)
        assert stub.bodies[0]["model"] == "two"
    with Stub(models=()) as stub:
        answerer_of(stub).answer(asked, sampling())
        assert "model" not in stub.bodies[0]


def test_answers_of_nothing_and_of_too_much():
    nothing = {"token_ids": [], "text": ""}
    replies = [nothing, {"token_ids": [END], "text": ""}, nothing | {"finish_reason": "length"}]
    replies += [{"token_ids": [5] * 50, "finish_reason": "length"}, {"token_ids": [5, 7]}]
    with Stub(lambda stub, body: vllm(body, **replies[body["seed"] - 100])) as stub:
        assert answerer_of(stub).answer(questions(5), sampling()) == [
            Answer([], finished=False),
            Answer([END], finished=True),
            Answer([], finished=False),
            Answer([5] * REAL, finished=False, exact=False),
            Answer([5, 7], finished=False),  # 7 ends answers there, not here
        ]


def test_text_is_encoded_anew_and_held_against_the_count_of_tokens():
    def reply(text, reason, drawn):
        return {"token_ids": None, "text": text, "finish_reason": reason, "completion_tokens": drawn}

    replies = [reply("abc", "stop", 4), reply("abc", "stop", 3), reply("abc", "length", 3), reply("", "stop", 1)]
    with Stub(lambda stub, body: vllm(body, **replies[body["seed"] - 100])) as stub:
        stub.probed = lambda body: vllm(body, token_ids=None)
        abc = TOKENIZER("abc")["input_ids"]
        assert answerer_of(stub).answer(questions(4), sampling()) == [
            Answer([*abc, END], finished=True, exact=True),
            Answer([*abc, END], finished=True, exact=False),
            Answer(abc, finished=False, exact=True),
            Answer([END], finished=True, exact=True),
        ]


def _chats(text: str | None = "abc", **more: Any) -> Reply:
    """Only chats, and no field that OpenAI's API does not have."""

    def reply(stub, body):
        if unknown := body.keys() - {"path", "model", "messages", "max_tokens", "seed", "temperature", "top_p"}:
            return 422, {"detail": f"unknown: {unknown}"}, {}
        said = [m["content"] for m in body["messages"]]
        usage = {"prompt_tokens": len(_templated(said)), "completion_tokens": 4}
        message = {"content": text, "role": "assistant"} | more
        return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}

    return reply


def _templated(said: list[str]) -> list[int]:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return TOKENIZER.apply_chat_template(
        messages, chat_template=TEMPLATE, add_generation_prompt=True, return_dict=False
    )


def test_a_server_that_only_chats_gets_the_conversation():
    said = ["first", "answer", "second"]
    with Stub(_chats()) as stub:
        stub.probed = lambda body: stub.reply(stub, body)
        answerer = answerer_of(stub, chat_template=True)
        answers = answerer.answer([Question(_templated(said), said)], sampling())
        assert answers == [Answer([*TOKENIZER("abc")["input_ids"], END], finished=True)]
        assert stub.bodies == [
            {
                "path": "/v1/chat/completions",
                "model": "stub",
                "messages": [
                    {"role": "user", "content": "first"},
                    {"role": "assistant", "content": "answer"},
                    {"role": "user", "content": "second"},
                ],
                "max_tokens": REAL,
                "seed": 100,
                "temperature": 0.0,
                "top_p": 0.9,
            }
        ]
        words = ("machine.server_api=completions",)
        assert "unknown" in _error(answerer_of(stub, chat_template=True, words=words))


def test_reasoning_that_was_cut_out_of_the_answer_is_refused():
    with Stub(_chats(None, reasoning_content="hm")) as stub:
        stub.probed = lambda body: stub.reply(stub, body)
        asked = [Question(_templated(["hello"]), ["hello"])]
        assert "reasoning parser" in _error(answerer_of(stub, chat_template=True), asked)


@pytest.mark.parametrize(("drawn_at", "wrong"), [(0.0, "equal answers at temperature 2"), (1.0, "different answers")])
def test_a_server_that_keeps_one_temperature_for_all_is_refused(drawn_at, wrong):
    text_of = {0.0: lambda n: "same", 1.0: lambda n: f"answer {n}"}[drawn_at]

    def reply(stub, body):
        if body["path"] != "/v1/completions" or not isinstance(body["prompt"], str) or "generation_config" not in body:
            return 400, {"detail": "prompt must be a string."}, {}
        usage = {"prompt_tokens": len(TOKENIZER(body["prompt"])["input_ids"]), "completion_tokens": 9}
        return {"choices": [{"text": text_of(len(stub.headers)), "finish_reason": "length"}], "usage": usage}

    with Stub(reply) as stub:
        stub.probed = lambda body: stub.reply(stub, body)
        said = _error(answerer_of(stub, words=("generate.temperatures=[1.0]",)), questions(3, 1.0))
    assert wrong in said
    assert "--continuous-batching" in said


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["machine.servers=[node1:8000]"], "http://node1:8000/v1"),
        (["machine.servers=[http://me:secret@node1/v1]"], "OPENAI_API_KEY"),
        (["machine.servers=[http://a/v1,http://a/v1]"], "different"),
        (["machine.servers=[http://a:99999/v1]"], "http://node1:8000/v1"),
        (["machine.server_api=rest"], "auto or completions or chat"),
        (["machine.server_timeout=0"], "above 0"),
        ([], "machine.servers=[]"),
        (["machine.servers=[http://a/v1]", "machine.server_api=chat"], "prompts.chat_template=none"),
    ],
)
def test_settings_that_cannot_be(words, complaint):
    with pytest.raises(UserError, match=re.escape(complaint)):
        Servers(load(None, words).machine, TOKENIZER, [END], chat_template=False, draws=False)


def test_an_address_that_is_none():
    assert "http://ü-/v1 is no URL" in _error(answerer_of("http://ü-/v1"))


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_closes_everything_and_the_answerer_can_be_asked_again(caplog, interruptible):
    hanging = threading.Event()

    def reply(stub, body):
        if not hanging.is_set():
            os.kill(os.getpid(), signal.SIGINT)
            hanging.wait(30)
        return vllm(body)

    with Stub(reply) as stub, caplog.at_level(logging.WARNING):
        answerer, asked = answerer_of(stub), questions(5)
        with pytest.raises(KeyboardInterrupt):
            answerer.answer(asked, sampling())
        hanging.set()
        assert answerer.answer(asked, sampling()) == expected(asked)
    assert not caplog.records


# ---- the real thing


def _ascii_backbone(folder: Path) -> Path:
    """It writes printable ASCII alone, which becomes the same ids again; ends now and then; has a chat template."""
    path = tiny_backbone(folder, seed=3)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.lm_head.weight[94:] = 0
        model.lm_head.weight[END] = 1.01 * model.lm_head.weight[40]  # likely at times
    model.save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


class Serve:
    """`transformers serve` of a folder, until it answers and then until `close`."""

    def __init__(self, path: Path, home: Path, *flags: str):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}/v1"
        command = [
            Path(sys.executable).with_name("transformers"),
            "serve",
            path,
            "--device",
            "cpu",
            "--host",
            "127.0.0.1",
        ]
        self.log = home / "serve.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*map(str, command), "--port", str(port), *flags],
                env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(home)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        for _ in range(1200):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    return
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        self.close()
        raise RuntimeError(self.log.read_text()[-2000:])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    return _ascii_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def served(backbone, tmp_path_factory):
    serve = Serve(backbone, tmp_path_factory.mktemp("home"))
    yield serve.url
    serve.close()


def _served_answerer(url: str, backbone: Path, *words: str, chat_template: bool = False) -> Servers:
    return answerer_of(url, words=words, tokenizer=AutoTokenizer.from_pretrained(backbone), chat_template=chat_template)


def _by_itself(backbone: Path, asked: list[Question], max_new_tokens: int) -> list[Answer]:
    """What the backbone in this process says to each alone, greedy."""
    model = AutoModelForCausalLM.from_pretrained(backbone).eval()
    answers = []
    for question in asked:
        ids = torch.tensor([question.ids])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        new = out[0, ids.shape[1] :].tolist()
        answers.append(Answer(new, finished=new[-1] == END))
    return answers


@pytest.mark.parametrize("chat_template", [False, True])
def test_transformers_serve_answers_as_the_backbone_does_here(served, backbone, chat_template):
    asked = questions(8)
    if chat_template:
        asked = [Question(_templated(q.conversation), q.conversation) for q in asked]
    alone = _by_itself(backbone, asked, REAL)
    assert {a.finished for a in alone} == {True, False}, "some should end early, some not"
    assert _served_answerer(served, backbone, chat_template=chat_template).answer(asked, sampling()) == alone


def test_transformers_serve_draws_where_it_is_told_to(served, backbone):
    answerer = _served_answerer(served, backbone, "generate.temperatures=[0.0,1.0]")
    asked = [q for pair in zip(questions(6), questions(6, 1.0), strict=True) for q in pair]
    answers = answerer.answer(asked, sampling())
    assert answers[0::2] == _by_itself(backbone, asked[0::2], REAL)
    assert all(a.ids != b.ids for a, b in zip(answers[0::2], answers[1::2], strict=True))


def test_transformers_serve_of_another_tokenizer_is_refused(served, backbone):
    asked = [Question([1, *q.ids], q.conversation) for q in questions(2)]
    assert "has 11 for this backbone" in _error(_served_answerer(served, backbone), asked)
    told = _error(_served_answerer(served, backbone, "machine.server_model=other"))
    assert f"pinned to '{backbone}'" in told
    assert "machine.server_model" in told


def test_the_stage_survives_a_dead_server_and_takes_another(served, backbone, tmp_path, monkeypatch):
    """Killed in its second shard; the run goes on at another address, and the rows are those of engine padded."""
    monkeypatch.setattr(server, "TRIES", 2)
    monkeypatch.setattr(server, "FIRST_PAUSE", 0.01)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(9)))
    words = [
        f"run.dir={tmp_path}", f"backbone.name_or_path={backbone}", "backbone.dtype=float32", "prompts.held_out=0",
        f"prompts.path={tmp_path / 'prompts.jsonl'}", "generate.num_prompts=0", "generate.max_new_tokens=30",
        "generate.shard_size=3", "generate.temperatures=[0.0]", "machine.device=cpu",
    ]  # fmt: skip

    def rows(name: str, *more: str) -> list[dict[str, Any]]:
        run = RunDir(load(None, [*words, f"run.name={name}", *more]))
        generate.run(run)
        return [row for name in Responses(run / "responses").names() for row in rows_of(run / "responses" / name)]

    dying = Stub(lambda stub, body: vllm(body) if len(stub.bodies) <= 4 else None)
    with dying, pytest.raises(UserError, match=r"no server answers.*the responses that are written are kept"):
        rows("served", "generate.engine=server", f"machine.servers=[{dying.url}]")
    half = RunDir(load(None, [*words, "run.name=served"])) / "responses"
    (kept,) = half.glob("shard-*.parquet")
    (half / "entries" / f"{kept.stem}.json").unlink()  # the stub's answers are not the backbone's
    kept.unlink()
    found = rows("served", "generate.engine=server", f"machine.servers=[{served}]")
    assert served.split("/")[2] not in (half / "manifest.json").read_text(), "where servers are is nobody's matter"
    expected = rows("padded")
    assert [r | {"reproducible": True} for r in found] == expected
    assert not any(r["reproducible"] for r in found) and all(r["exact"] for r in found)


@pytest.mark.slow
def test_transformers_serve_with_continuous_batching_cannot_mix_temperatures(backbone, tmp_path):
    serve = Serve(backbone, tmp_path, "--continuous-batching", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "256")
    try:
        asked = questions(6)
        assert _served_answerer(serve.url, backbone).answer(asked, sampling()) == _by_itself(backbone, asked, REAL)
        mixed = _served_answerer(serve.url, backbone, "generate.temperatures=[0.0,1.0]")
        assert "--continuous-batching" in _error(mixed, questions(6, 1.0))
    finally:
        serve.close()
