"""OpenAI-compatible servers answer the questions, many servers and many questions at once.

Takes the `machine` section of the config, the backbone's tokenizer and end tokens, and whether the questions were made
with its chat template; gives each question's new token ids.

Every server has workers of its own, which take the questions from one line. A server that fails rests, longer each
time, and its question goes back to the head of the line, where the next free worker of any server finds it.
"""

import asyncio
import os
import random
import re
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

# Not the package openai, which is built on this client: it tries again on the server that failed instead of the next
# one, has no fields for token ids, and insists on a model's name where `transformers serve` with a folder wants none.
import httpx2

from ...config import Machine
from ...errors import UserError
from .interface import Answer, Question, Report, Sampling
from .server_replies import Foreign, Unreadable, answer_in, check_words
from .server_requests import Way, body_of, ways

TRIES = 8
"""So many failures in a row, about a minute of pauses, and a server is dead, or a question cannot be answered."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0
HANG = 3
"""A timeout counts as this many failures: it took long enough."""
CONNECT_SECONDS, LIST_SECONDS = 10.0, 60.0
PROBE_TOKENS, PROBE_QUESTIONS = 32, 4


class Failed(Exception):
    """Trying again may help. `gone`: there is no connection; `of_question`: the question may be the cause."""

    def __init__(self, said: str, *, weight: int = 1, gone: bool = False, of_question: bool = True, pause: float = 0.0):
        super().__init__(said)
        self.weight, self.gone, self.of_question, self.pause = weight, gone, of_question, pause


class Refused(Exception):
    """The server will not take such a request, however often it comes."""

    def __init__(self, status: int, said: str):
        super().__init__(said)
        self.status = status


@dataclass
class _Endpoint:
    url: str
    model: str | None = None
    way: Way | None = None
    """Of asking it; None before it was greeted, and when its process may have been started anew."""
    failures: int = 0
    """In a row."""
    failed_at: float = 0.0
    pause_it_wants: float = 0.0
    said: str = ""
    """What went wrong last."""
    door: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the worker that tries whether the server is back; the others wait."""

    @property
    def is_well(self) -> bool:
        return self.way is not None and not self.failures


class _Call:
    """One call of `answer`: what is still to be asked, and what came of it."""

    def __init__(
        self, client: httpx2.AsyncClient, questions: list[Question], sampling: Sampling, report: Report | None
    ):
        self.client, self.questions, self.sampling, self.report = client, questions, sampling, report
        self.answers: dict[int, Answer] = {}
        self.failures: defaultdict[int, Counter[str]] = defaultdict(Counter)
        """Of each question, by server."""
        self.probe = min(PROBE_TOKENS, sampling.max_new_tokens), sampling.seed
        """Most tokens and seed of the questions that only try a server out."""
        self.line: asyncio.PriorityQueue[int] = asyncio.PriorityQueue()
        for place in range(len(questions)):
            self.line.put_nowait(place)

    def put_back(self, place: int) -> None:
        self.line.put_nowait(place)
        self.line.task_done()


class Servers:
    """Reads the keys machine.servers and machine.server_*, and OPENAI_API_KEY of the environment."""

    reproducible = False  # what shares a batch on a server changes its sums, and few servers keep to a seed

    def __init__(self, machine: Machine, tokenizer: Any, ends: list[int], *, chat_template: bool, draws: bool):
        """`ends` end an answer; `chat_template`: questions are made with one; `draws`: not all temperatures are 0."""
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
        if not re.fullmatch("[!-~]*", self.key):  # the client's own error would show it
            raise UserError("OPENAI_API_KEY: holds characters that cannot be in a key; set it anew or unset it")
        self.servers = [_Endpoint(url.rstrip("/")) for url in machine.servers]
        self.model, self.timeout = machine.server_model, machine.server_timeout
        self.draws = draws
        self.ways = ways(machine.server_api, chat_template)
        self.tokenizer, self.ends = tokenizer, ends

    def answer(self, questions: list[Question], sampling: Sampling, report: Report | None = None) -> list[Answer]:
        """The answer of each question, in their order. Raises UserError when no server gives one any more."""
        try:
            return asyncio.run(self._answer(questions, sampling, report))
        except BaseExceptionGroup as group:  # of the workers: the first one stopped the others
            raise group.exceptions[0] from None

    async def _answer(self, questions: list[Question], sampling: Sampling, report: Report | None) -> list[Answer]:
        client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),  # `_send` has a limit for the whole
            # No connection is used twice: a server may close an idle one just as the next question goes out on it, as
            # `transformers serve` does after every error, and next to an answer a new one costs nothing.
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

    # ---- who asks, and what happens when it goes wrong

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
        """Greet the server if it must be; after failures, one question then shows whether it is well again."""
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
        """Answer the next question of the line, or put it back there."""
        way = server.way
        assert way is not None
        place = await call.line.get()
        if server.failures and not on_trial:  # since this worker began to wait at the line
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
        """A question's failures so far: were they enough, and not of one server that is itself to blame?"""
        others_are_well = any(s.is_well for s in self.servers if s is not server)
        return failures.total() >= TRIES and (len(failures) > 1 or not others_are_well)

    def _note(self, server: _Endpoint, failure: Failed, began: float) -> None:
        """One more failure of this server. Raises UserError when all servers are dead."""
        if failure.gone:
            server.way = None
        if began < server.failed_at:  # asked before the last failure: a whole batch dies but once
            return
        server.failures += failure.weight
        server.failed_at, server.pause_it_wants, server.said = time.monotonic(), failure.pause, str(failure)
        if all(s.failures >= TRIES for s in self.servers):
            raise UserError(
                f"machine.servers: no server answers any more. {self._last_words()}. {self._remedy(failure)}"
            )

    def _last_words(self) -> str:
        """What each server that failed said last."""
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

    # ---- getting to know a server

    async def _greet(self, server: _Endpoint, call: _Call) -> Way:
        """The first way of asking that this server takes, once it is clear that it holds this backbone."""
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
        """The one that it lists; None if it lists none, as `transformers serve` does with the model of a folder."""
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
        """Raises UserError if the server does not draw as it is told, by two answers each to some questions.

        `transformers serve --continuous-batching` keeps the temperature of its first request for all that follow.
        """
        tokens, seed = call.probe
        for temperature in (0.0, 2.0) if self.draws else (0.0,):
            as_told: list[bool] = []
            for question in call.questions[:PROBE_QUESTIONS]:
                question = replace(question, temperature=temperature)
                one, other = [(await self._ask(server, call, way, question, tokens, seed + i))[0].ids for i in range(2)]
                if len(one) > 1:  # of no answer, or the end token alone, nothing can be said
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
        """The JSON that comes back within so many seconds. Raises Failed or Refused."""
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
        """The first line of the server's error, and never the key."""
        try:
            said = response.json()
            for name in ("error", "message", "detail"):
                said = said.get(name, said) if isinstance(said, dict) else said
        except ValueError:
            said = response.text
        line = _first_line(said) or f"{response.status_code} {response.reason_phrase}"
        return line.replace(self.key, "***") if self.key else line


def _pause(server: _Endpoint) -> float:
    """Seconds of rest: twice as many after each failure, and not in step with others who ask the same server."""
    grown = min(FIRST_PAUSE * 2 ** (server.failures - 1), LONGEST_PAUSE) * random.uniform(0.5, 1.5)
    return max(grown, min(server.pause_it_wants, LONGEST_PAUSE))


def _retry_after(response: httpx2.Response) -> float:
    try:
        return float(response.headers.get("Retry-After", 0))
    except ValueError:  # a date; the growing pauses will do
        return 0.0


def _first_line(said: Any, length: int = 200) -> str:
    lines = str(said).strip().splitlines()
    return lines[0][:length] if lines else ""
