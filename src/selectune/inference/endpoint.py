"""Answers of an OpenAI-compatible endpoint (chat completions).

Knows: how a question is sent, what is tried again and after how long, what was used of a budget, and where a key may go: to the one address that was
named, never in clear text over a network, never along a redirect. Does not know: what is asked.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from selectune.errors import UserError
from selectune.inference.remembering import Question, Rehearsal, Remembering, about_tokens

TRIES = 6
"""Of one question, the first included."""
PAUSE = 1.0
"""Seconds before the second try, at most; each later one up to twice as many, or what the endpoint asks for."""
LONGEST_PAUSE = 60.0
TIMEOUT = (10, 600)
"""Seconds to connect, and to wait for an answer."""
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
"""Statuses after which a question is asked again."""
_OWN_KEYS = {"api.openai.com": "OPENAI_API_KEY"}
_HERE = ("localhost", "127.0.0.1", "::1")


@dataclass
class Budget:
    """What one run may use of an endpoint; None: as much as it takes."""

    most_tokens: int | None = None
    """Of prompts and answers together."""
    most_cost: float | None = None
    prices: tuple[float, float] = (0.0, 0.0)
    """Of a million tokens that are read, and of a million that are written."""
    read: int = 0
    written: int = 0
    held: tuple[int, int] = (0, 0)
    """The most that the questions now on their way may use, read and written."""

    def cost(self, read: int, written: int) -> float:
        """Return the price of tokens."""
        return (read * self.prices[0] + written * self.prices[1]) / 1e6

    def allows(self, read: int, written: int) -> bool:
        """Whether a question may be asked that reads and writes at most so much."""
        read, written = self.read + self.held[0] + read, self.written + self.held[1] + written
        within = self.most_tokens is None or read + written <= self.most_tokens
        return within and (self.most_cost is None or self.cost(read, written) <= self.most_cost)

    def hold(self, read: int, written: int) -> None:
        """Set aside (or, negative, give back) what a question may use."""
        self.held = (self.held[0] + read, self.held[1] + written)

    def __str__(self) -> str:
        spent = f"{self.read + self.written:,} tokens"
        return f"{spent}, {self.cost(self.read, self.written):.2f}" if any(self.prices) else spent


class EndpointResponder(Remembering):
    """A model behind an address answers, a few questions at once.

    Args:
        url: base address, such as ``https://api.openai.com/v1``. name: the model's there. key_from: environment variable of the key; left out:
            ``OPENAI_API_KEY`` for api.openai.com, and no key for any other address. together: questions on their way at once.

    Raises:
        UserError: an address or a key that will not do.
    """

    def __init__(
        self,
        url: str,
        name: str,
        key_from: str | None = None,
        budget: Budget | None = None,
        together: int = 4,
        kept: Path | None = None,
        quiet: bool = False,
        rehearsal: Rehearsal | None = None,
    ) -> None:
        super().__init__(kept, quiet, rehearsal)
        self._address, self._here = _checked(url)
        self.name, self.budget, self._together = name, budget or Budget(), together
        self.model = f"{self._address} {name}"
        host = urlsplit(self._address).hostname or ""
        self._key_from = key_from or _OWN_KEYS.get(host)
        self._key = "" if rehearsal is not None else self._secret()
        self._of_thread = threading.local()
        self._stopped = threading.Event()
        self._limit_field = "max_tokens"

    def _secret(self) -> str:
        if self._key_from is None:
            return ""
        key = os.environ.get(self._key_from, "").strip()
        if not key:
            raise UserError(f"the environment variable {self._key_from} is not set", field="key_from", expected="the endpoint's key",
                            mend=f"export {self._key_from}=...")  # fmt: skip
        if self._address.startswith("http:") and not self._here:
            raise UserError(
                f"the key would travel to {self._address} unencrypted", field="by_endpoint", expected="an https address"
            )
        return key

    # -- many questions ----------------------------------------------------------------------------------------------------

    def ask(self, questions: list[Question]) -> Iterator[tuple[Question, str]]:
        """Send questions, give answers as they come (see :meth:`Remembering.ask`).

        Raises:
            UserError: the endpoint does not answer, or the budget is used up; not before what was on its way has been given.
        """
        waiting = list(reversed(questions))
        coming: dict[Future[Any], Question] = {}
        failed: UserError | None = None
        self._stopped.clear()
        with ThreadPoolExecutor(self._together) as workers, self._stopping():
            while waiting or coming:
                while waiting and failed is None and len(coming) < self._together:
                    if self.budget.allows(*_most(waiting[-1])):
                        question = waiting.pop()
                        self.budget.hold(*_most(question))
                        coming[workers.submit(self._answer, question)] = question
                    elif coming:  # less may be used than was set aside
                        break
                    else:
                        failed = self._over(len(questions) - len(waiting), len(questions))
                if not coming:
                    break
                done = wait(coming, return_when=FIRST_COMPLETED).done
                for future in sorted(done, key=lambda one: coming[one].sample):
                    question = coming.pop(future)
                    self.budget.hold(*(-most for most in _most(question)))
                    try:
                        text, read, written = future.result()
                    except UserError as error:
                        failed = failed or error
                        continue
                    self.budget.read += read
                    self.budget.written += written
                    yield question, text
        if failed is not None:
            raise failed

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """After an interruption nothing is tried again."""
        try:
            yield
        except BaseException:
            self._stopped.set()
            raise

    def _over(self, done: int, count: int) -> UserError:
        return UserError(f"the budget does not reach further: {done:,} of {count:,} answers came, for {self.budget}",
                         field="most_tokens" if self.budget.most_tokens is not None else "most_cost",
                         mend=f"run again: what came is kept{self._where()} and not asked again")  # fmt: skip

    def _where(self) -> str:
        return "" if self.kept is None else f" in {self.kept}"

    # -- one question ------------------------------------------------------------------------------------------------------

    def _answer(self, question: Question) -> tuple[str, int, int]:
        """Return an answer, and the tokens that were read and written."""
        problem = ""
        for attempt in range(TRIES):
            pause = random.uniform(0.5, 1) * PAUSE * 2**attempt
            limit = self._limit_field
            try:
                reply = self._session().post(
                    f"{self._address}/chat/completions", json=self._body(question, limit), timeout=TIMEOUT, allow_redirects=False
                )
            except requests.RequestException as error:
                problem = f"cannot be reached ({type(error).__name__})"
            else:
                if reply.status_code == 200:
                    found = _understood(reply, question)
                    if found is not None:
                        return found
                    problem = "does not reply as chat completions do"
                elif reply.status_code in AGAIN:
                    problem = f"has no answer now (status {reply.status_code})"
                    pause = _asked_for(reply) or pause
                elif limit == "max_tokens" and self._other_limit(reply):
                    continue
                else:
                    raise self._refused(reply)
            if attempt + 1 < TRIES and self._stopped.wait(min(pause, LONGEST_PAUSE)):
                break
        raise UserError(f"the endpoint {self._address} {problem}, {TRIES} times in a row",
                        mend=f"run again later: what was answered is kept{self._where()}")  # fmt: skip

    def _body(self, question: Question, limit: str) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.name,
            "messages": [{"role": message.role, "content": message.content} for message in question.messages],
            "temperature": question.temperature,
            limit: question.max_new_tokens,
        }
        return body | ({"seed": question.seed * 1000 + question.sample} if question.temperature > 0 else {})

    def _other_limit(self, reply: requests.Response) -> bool:
        """Whether the endpoint wants the limit of an answer under its newer name; it is used from now on."""
        wanted = reply.status_code == 400 and "max_completion_tokens" in reply.text
        if wanted:
            self._limit_field = "max_completion_tokens"
        return wanted

    def _refused(self, reply: requests.Response) -> UserError:
        said = _message(reply)
        if self._key:
            said = said.replace(self._key, "(key)")
        if reply.status_code in (401, 403):
            whose = f"the key of {self._key_from}" if self._key_from else "questions without a key"
            return UserError(f"the endpoint refuses {whose} (status {reply.status_code}: {said})", field="key_from",
                             expected="the environment variable that holds this endpoint's key")  # fmt: skip
        if 300 <= reply.status_code < 400:
            return UserError(
                "the endpoint sends elsewhere, and no key follows it", field="by_endpoint", expected="the final address"
            )
        return UserError(f"the endpoint refuses a question to '{self.name}' (status {reply.status_code}: {said})", field="by_model",
                         expected="a model that is there, and an address that ends like /v1")  # fmt: skip

    def _session(self) -> requests.Session:
        if not hasattr(self._of_thread, "session"):
            session = requests.Session()
            session.trust_env = not self._here  # no proxy between this machine and itself
            session.auth = self._sign  # also keeps a .netrc from signing
            self._of_thread.session = session
        return self._of_thread.session

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


def _checked(url: str) -> tuple[str, bool]:
    """Return an address without its last slash, and whether it is this machine's."""
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UserError("is not the address of an endpoint", field="by_endpoint", expected="such as http://localhost:8000/v1")
    if parts.username or parts.password:
        raise UserError("has a name or a password in it, which would be written into files", field="by_endpoint",
                        expected="the address alone", mend="put the key into an environment variable and name it by key_from")  # fmt: skip
    return url.strip().rstrip("/").removesuffix("/chat/completions"), parts.hostname in _HERE


def _most(question: Question) -> tuple[int, int]:
    return about_tokens(question.messages), question.max_new_tokens


def _understood(reply: requests.Response, question: Question) -> tuple[str, int, int] | None:
    """Return the answer and its tokens, or None where the reply is not what it should be."""
    try:
        values = reply.json()
        text = values["choices"][0]["message"]["content"] or ""
        used = values.get("usage") or {}
        read, written = used.get("prompt_tokens"), used.get("completion_tokens")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None
    if not isinstance(text, str):
        return None
    most = _most(question)
    text = text.encode(errors="replace").decode()  # half a character is none
    return text.strip(), read if isinstance(read, int) else most[0], written if isinstance(written, int) else len(text) // 4 + 1


def _message(reply: requests.Response) -> str:
    try:
        error = reply.json()["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        text = reply.text
    return str(text)[:200]


def _asked_for(reply: requests.Response) -> float | None:
    """Return the seconds after which the endpoint wants to be asked again, where it says so."""
    try:
        return max(0.0, float(reply.headers["Retry-After"]))
    except (KeyError, ValueError):
        return None
