"""The answerer `server`: OpenAI-compatible servers, many servers and many questions at once.

Takes the `machine` section of the config, the backbone's tokenizer and end tokens, and whether the questions use its
chat template; gives each question's new token ids.

Every server has its own workers, which take questions from one queue. A server that fails is not asked for a while,
longer after each failure, and its question goes back to the head of the queue for the next free worker of any server.
"""

import asyncio
import os
import random
import re
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

# The package openai, which is built on this client, does not fit: it retries on the failed server instead of another
# one, has no fields for token ids, and requires a model's name where `transformers serve` with a folder accepts none.
import httpx2

from ...config import Machine
from ...errors import UserError
from .interface import Answer, Question, Report, Sampling
from .server_replies import Foreign, Unreadable, answer_in, check_words
from .server_requests import Way, body_of, ways

TRIES = 8
"""Failures in a row, over about a minute, after which a server counts as dead or a question as unanswerable."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0
HANG = 3
"""A timeout counts as this many failures, since it takes long."""
CONNECT_SECONDS, LIST_SECONDS = 10.0, 60.0
PROBE_TOKENS, PROBE_QUESTIONS = 32, 4


class Failed(Exception):
    """A failure that a retry may resolve. `gone`: no connection; `of_question`: the question may be the cause."""

    def __init__(self, said: str, *, weight: int = 1, gone: bool = False, of_question: bool = True, pause: float = 0.0):
        super().__init__(said)
        self.weight, self.gone, self.of_question, self.pause = weight, gone, of_question, pause


class Refused(Exception):
    """The server rejects this kind of request; a retry does not help."""

    def __init__(self, status: int, said: str):
        super().__init__(said)
        self.status = status


@dataclass
class _Endpoint:
    url: str
    model: str | None = None
    way: Way | None = None
    """How to ask it; None before the first contact, and when the server may have been restarted since."""
    failures: int = 0
    """Weight of the failures in a row."""
    failed_at: float = 0.0
    pause_it_wants: float = 0.0
    said: str = ""
    """The message of the last failure."""
    door: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the worker that tests whether the server is back; its other workers wait."""

    @property
    def is_well(self) -> bool:
        return self.way is not None and not self.failures


class _Call:
    """The state of one call of `answer`: the queue, the answers and the failures."""

    def __init__(
        self, client: httpx2.AsyncClient, questions: list[Question], sampling: Sampling, report: Report | None
    ):
        self.client, self.questions, self.sampling, self.report = client, questions, sampling, report
        self.answers: dict[int, Answer] = {}
        self.failures: defaultdict[int, Counter[str]] = defaultdict(Counter)
        """Question -> server -> failures."""
        self.probe = min(PROBE_TOKENS, sampling.max_new_tokens), sampling.seed
        """Maximum number of tokens, and seed, of the requests that only test a server."""
        self.line: asyncio.PriorityQueue[int] = asyncio.PriorityQueue()
        for place in range(len(questions)):
            self.line.put_nowait(place)

    def put_back(self, place: int) -> None:
        self.line.put_nowait(place)
        self.line.task_done()


class Servers:
    """Answers with the servers of machine.servers (and machine.server_*); the key is OPENAI_API_KEY's value."""

    reproducible = False  # other requests in a batch change floating-point rounding, and few servers use the seed

    def __init__(self, machine: Machine, tokenizer: Any, ends: list[int], *, chat_template: bool, draws: bool):
        """`ends`: ids that end an answer; `chat_template`: questions use one; `draws`: some temperature is above 0."""
        if not machine.servers:
            raise UserError(
                "machine.servers=[]: generate.engine=server needs the URL of one or more, such as [http://node1:8000/v1]"
            )
        if machine.server_api == "chat" and not chat_template:
            raise UserError(
                "machine.server_api=chat: a server wraps chats in its chat template, and prompts.chat_template=none. "
                "Set that to tokenizer, or machine.server_api=auto."
            )
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not re.fullmatch("[!-~]*", self.key):  # the client's own error would print the key
            raise UserError("OPENAI_API_KEY: holds characters that cannot be in a key; set it anew or unset it")
        self.servers = [_Endpoint(url.rstrip("/")) for url in machine.servers]
        self.model, self.timeout = machine.server_model, machine.server_timeout
        self.draws = draws
        self.ways = ways(machine.server_api, chat_template)
        self.tokenizer, self.ends = tokenizer, ends

    def answer(self, questions: list[Question], sampling: Sampling, report: Report | None = None) -> list[Answer]:
        """The answers, in the questions' order. Raises UserError if no server can answer a question."""
        try:
            return asyncio.run(self._answer(questions, sampling, report))
        except BaseExceptionGroup as group:  # raised by the workers: the first error stopped the others
            raise group.exceptions[0] from None

    async def _answer(self, questions: list[Question], sampling: Sampling, report: Report | None) -> list[Answer]:
        client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),  # `_send` limits the whole request
            # Connections are not reused: a server may close an idle one just when the next request is sent on it, as
            # `transformers serve` does after every error, and a new connection costs little beside an answer.
            limits=httpx2.Limits(max_keepalive_connections=0),
        )
        async with client, asyncio.TaskGroup() as group:
            call = _Call(client, questions, sampling, report)
            workers = []
            for at, server in enumerate(self.servers):
                server.door = asyncio.Lock()  # a lock belongs to one event loop
                share = max(1, (sampling.batch_size + at) // len(self.servers))
                workers += [group.create_task(self._work(server, call)) for _ in range(share)]
            await call.line.join()
            for worker in workers:
                worker.cancel()
        return [call.answers[place] for place in range(len(questions))]

    # ---- workers and failures

    async def _work(self, server: _Endpoint, call: _Call) -> None:
        try:
            while True:
                if server.is_well:
                    await self._take(server, call)
                    continue
                async with server.door:
                    if not server.is_well:
                        await self._come_back(server, call)
        except Foreign as error:
            raise UserError(f"machine.servers: {server.url} {error}") from None
        except Refused as refusal:
            raise UserError(self._explained(server, refusal)) from None

    async def _come_back(self, server: _Endpoint, call: _Call) -> None:
        """Check the server if necessary; after failures, one question then tests whether it answers again."""
        if server.failures:
            await asyncio.sleep(_pause(server))
        if server.way is None:
            began = time.monotonic()
            try:
                server.way = await self._greet(server, call)
            except Failed as failure:
                self._note(server, failure, began)
                return
        if server.failures:
            await self._take(server, call, on_trial=True)

    async def _take(self, server: _Endpoint, call: _Call, *, on_trial: bool = False) -> None:
        """Answer the next question of the queue, or put it back after a failure."""
        way = server.way
        assert way is not None
        place = await call.line.get()
        if server.failures and not on_trial:  # it failed while this worker waited for the queue
            call.put_back(place)
            return
        question, began = call.questions[place], time.monotonic()
        try:
            answer, _ = await self._ask(
                server, call, way, question, call.sampling.max_new_tokens, call.sampling.seed + place
            )
        except Failed as failure:
            call.put_back(place)
            self._note(server, failure, began)
            if failure.of_question:
                call.failures[place][server.url] += failure.weight
            if self._is_hopeless(call.failures[place], server):
                raise UserError(
                    f"machine.servers: no server answers question {place + 1} of {len(call.questions)} "
                    f"({len(question.ids)} tokens). {self._last_words()}. {self._remedy(failure)}"
                ) from None
        else:
            server.failures = 0
            call.answers[place] = answer
            if call.report is not None:
                call.report(1, len(answer.ids))
            call.line.task_done()

    def _is_hopeless(self, failures: Counter[str], server: _Endpoint) -> bool:
        """Whether to give a question up: TRIES failures, on several servers or while no other server works."""
        others_are_well = any(s.is_well for s in self.servers if s is not server)
        return failures.total() >= TRIES and (len(failures) > 1 or not others_are_well)

    def _note(self, server: _Endpoint, failure: Failed, began: float) -> None:
        """Count a failure of this server. Raises UserError if all servers are dead now."""
        if failure.gone:
            server.way = None
        if began < server.failed_at:  # requests of one batch that fail together count once
            return
        server.failures += failure.weight
        server.failed_at, server.pause_it_wants, server.said = time.monotonic(), failure.pause, str(failure)
        if all(s.failures >= TRIES for s in self.servers):
            raise UserError(
                f"machine.servers: no server answers any more. {self._last_words()}. {self._remedy(failure)}"
            )

    def _last_words(self) -> str:
        """For messages: the last failure of each server that failed."""
        return "; ".join(f"{s.url}: {s.said}" for s in self.servers if s.said)

    def _remedy(self, failure: Failed) -> str:
        remedy = (
            f"Raise machine.server_timeout={self.timeout:g} or lower generate.batch_size"
            if failure.weight == HANG
            else "Start it, or see its own log"
        )
        return f"{remedy}; then give the same command again: the responses that are written are kept."

    def _explained(self, server: _Endpoint, refusal: Refused) -> str:
        remedy = {
            401: "Its key belongs into the environment variable OPENAI_API_KEY.",
            403: "Its key belongs into the environment variable OPENAI_API_KEY.",
            404: f"Is the URL whole (most end in /v1), and machine.server_model={self.model or 'null'} right?",
        }.get(refusal.status, "Change machine.server_model, machine.server_api, or how the server is started.")
        return f"machine.servers: {server.url} refuses ({refusal.status}): {refusal}. {remedy}"

    # ---- checking a server

    async def _greet(self, server: _Endpoint, call: _Call) -> Way:
        """The first way of asking that this server accepts, after a check that it serves this backbone."""
        server.model = self.model or await self._only_model(server, call)
        question, refused = replace(call.questions[0], temperature=0.0), Refused(0, "")
        for way in self.ways:
            try:
                answer, text = await self._ask(server, call, way, question, *call.probe)
            except Refused as refusal:
                refused = refusal
                continue
            check_words(answer, text, self.tokenizer)
            if way.dialect != "vllm":
                await self._check_temperatures(server, call, way)
            return way
        raise refused

    async def _only_model(self, server: _Endpoint, call: _Call) -> str | None:
        """The model that the server lists; None if it lists none, as `transformers serve` does for a local folder."""
        try:
            listed = await self._send(server, call, "GET", "models", min(LIST_SECONDS, self.timeout))
            names = [model["id"] for model in listed["data"]]
        except Failed as failure:
            if failure.gone or failure.weight == HANG:
                raise
            return None
        except (Refused, LookupError, TypeError):
            return None
        if len(names) > 1:
            raise UserError(
                f"machine.server_model=null: {server.url} lists {', '.join(names)}; set it to the one to be used"
            )
        return names[0] if names else None

    async def _check_temperatures(self, server: _Endpoint, call: _Call, way: Way) -> None:
        """Raises UserError if the server ignores the temperature, judged by two answers to each of a few questions.

        `transformers serve --continuous-batching` uses the temperature of its first request for all later ones.
        """
        tokens, seed = call.probe
        for temperature in (0.0, 2.0) if self.draws else (0.0,):
            as_told: list[bool] = []
            for question in call.questions[:PROBE_QUESTIONS]:
                question = replace(question, temperature=temperature)
                one, other = [(await self._ask(server, call, way, question, tokens, seed + i))[0].ids for i in range(2)]
                if len(one) > 1:  # an empty answer, or the end token alone, shows nothing
                    as_told.append((one == other) == (temperature == 0))
                if any(as_told):
                    break
            if as_told and not any(as_told):
                raise UserError(
                    f"machine.servers: {server.url} gives {'equal' if temperature else 'different'} answers at "
                    f"temperature {temperature:g}: it does not draw as it is told. `transformers serve` must be "
                    "started without --continuous-batching, which keeps the temperature of its first request."
                )

    # ---- one request

    async def _ask(
        self, server: _Endpoint, call: _Call, way: Way, question: Question, max_new_tokens: int, seed: int
    ) -> tuple[Answer, str]:
        body = body_of(question, way, call.sampling.top_p, max_new_tokens, seed, self.ends)
        if server.model is not None:
            body["model"] = server.model
        reply = await self._send(server, call, "POST", way.path, self.timeout, body)
        try:
            return answer_in(reply, question, max_new_tokens, self.ends, self.tokenizer)
        except Unreadable as error:
            raise Failed(str(error)) from None

    async def _send(
        self, server: _Endpoint, call: _Call, method: str, path: str, seconds: float, body: dict[str, Any] | None = None
    ) -> Any:
        """The JSON of the reply. Raises Failed (no reply within `seconds` too) or Refused."""
        try:
            async with asyncio.timeout(seconds):
                response = await call.client.request(method, f"{server.url}/{path}", json=body)
        except TimeoutError:
            raise Failed(f"nothing within {seconds:g} s", weight=HANG) from None
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise Failed(f"no connection ({_first_line(error)})", gone=True, of_question=False) from None
        except httpx2.RequestError as error:
            raise Failed(f"the connection broke ({_first_line(error)})", gone=True) from None
        except httpx2.InvalidURL as error:
            raise UserError(f"machine.servers: {server.url} is no URL: {error}") from None
        status = response.status_code
        if status == 429 or status >= 500:
            raise Failed(self._said(response), of_question=status != 429, pause=_retry_after(response))
        if status != 200:
            raise Refused(status, self._said(response))
        try:
            return response.json()
        except ValueError:
            raise Failed(f"no JSON but {response.text[:40]!r}") from None

    def _said(self, response: httpx2.Response) -> str:
        """The first line of the server's error message, with the API key masked."""
        try:
            said = response.json()
            for name in ("error", "message", "detail"):
                said = said.get(name, said) if isinstance(said, dict) else said
        except ValueError:
            said = response.text
        line = _first_line(said) or f"{response.status_code} {response.reason_phrase}"
        return line.replace(self.key, "***") if self.key else line


def _pause(server: _Endpoint) -> float:
    """Seconds to pause: doubled after each failure, with jitter so that the clients of a server do not synchronise."""
    grown = min(FIRST_PAUSE * 2 ** (server.failures - 1), LONGEST_PAUSE) * random.uniform(0.5, 1.5)
    return max(grown, min(server.pause_it_wants, LONGEST_PAUSE))


def _retry_after(response: httpx2.Response) -> float:
    try:
        return float(response.headers.get("Retry-After", 0))
    except ValueError:  # a date: the growing pauses suffice
        return 0.0


def _first_line(said: Any, length: int = 200) -> str:
    lines = str(said).strip().splitlines()
    return lines[0][:length] if lines else ""
