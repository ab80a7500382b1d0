"""One client for any endpoint that speaks the OpenAI protocol: a hosted model, vLLM, llama.cpp and others.

The key comes from ``OPENAI_API_KEY`` alone and is never written anywhere. Every answer is kept on disk as soon as it is
there, so that a stopped command goes on where it stopped and the same question is paid for once.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from kpig_fast.data.files import write_lines

if TYPE_CHECKING:
    from openai import OpenAI
    from tenacity import RetryCallState

Request = Mapping[str, Any]
"""The body of a call without the model: ``messages`` for a chat or ``prompt`` for a completion, and its options."""

_KEY, _URL = "OPENAI_API_KEY", "OPENAI_BASE_URL"
_LONGEST_WAIT = 60.0
_FIXES = {
    401: f"set {_KEY} to a valid key",
    403: f"set {_KEY} to a key that may use this model",
    404: "give a model that the server has, and a base URL that ends like the server's own, often in /v1",
    429: "the budget of the key is spent: raise it or use another key",
}


class RefusedError(ValueError):
    """The server refused what a request holds; the same request would be refused again."""


@dataclass(frozen=True)
class Endpoint:
    """A served model.

    Args:
        model: its name on the server.
        base_url: address of the server; default ``OPENAI_BASE_URL``, else the protocol's own host.
        cache: folder that keeps the answers, one file each, by model and request; None keeps none.
        concurrency: requests under way at the same time.
        timeout: seconds that one try may take.
        tries: how often a request is sent that meets a rate limit, a timeout or an error of the server.

    Raises:
        ValueError: ``concurrency`` or ``tries`` is below 1, or the address holds a password or a query.
    """

    model: str
    base_url: str | None = None
    cache: Path | None = None
    concurrency: int = 8
    timeout: float = 120.0
    tries: int = 6

    def __post_init__(self) -> None:
        for name in ("concurrency", "tries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")
        if set("@?") & set(self._url or ""):
            # The libraries write addresses into their logs.
            raise ValueError(f"the base URL holds a user or a query, which may be a secret; set {_KEY} instead")

    @property
    def _url(self) -> str | None:
        return self.base_url or os.environ.get(_URL)

    def answer(
        self,
        requests: Sequence[Request],
        *,
        keep: Callable[[str], bool] = lambda _: True,
        progress: bool = False,
        what: str = "asking",
    ) -> list[str]:
        """The text of the answer to every request, in their order.

        Args:
            requests: what to ask; equal ones are sent once.
            keep: whether an answer goes to the cache.
            progress: show a progress bar.
            what: its title.

        Raises:
            RefusedError: the server calls a request wrong.
            ValueError: it refuses the key or the model, or what it sends is no answer of the protocol; or neither a
                server is named nor a key is set.
            ModuleNotFoundError: the client library is not installed.
            ConnectionError: rate limits, timeouts or errors of the server until the last try.
        """
        keyed = {self._key(request): request for request in requests}
        answers = {key: text for key in keyed if (text := self._cached(key)) is not None}
        stopped = Event()
        with (
            tqdm(total=len(keyed), initial=len(answers), desc=what, unit="answer", disable=not progress) as bar,
            ThreadPoolExecutor(self.concurrency) as pool,
        ):
            open_ones = {key: request for key, request in keyed.items() if key not in answers}
            under_way = {
                pool.submit(self._ask_and_keep, key, request, keep, stopped): key for key, request in open_ones.items()
            }
            try:
                for done in as_completed(under_way):
                    key = under_way[done]
                    answers[key] = done.result()
                    bar.update()
            except BaseException:
                # Nobody waits for the next try of a request whose answer nobody reads.
                stopped.set()
                pool.shutdown(cancel_futures=True)
                raise
        return [answers[self._key(request)] for request in requests]

    @cached_property
    def _client(self) -> "OpenAI":
        try:
            from openai import OpenAI
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "a served model needs the package 'openai'; install it with: pip install 'kpig-fast[annotate]'"
            ) from error
        key = os.environ.get(_KEY)
        if not key and not self._url:
            raise ValueError(f"no endpoint is named; set {_KEY}, or give the base URL of a server such as vLLM")
        # A local server wants no key, the library wants one.
        return OpenAI(api_key=key or "none", base_url=self._url, timeout=self.timeout, max_retries=0)

    def _key(self, request: Request) -> str:
        text = json.dumps({"model": self.model, **request}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _file(self, key: str) -> Path | None:
        return self.cache and self.cache / f"{key}.json"

    def _cached(self, key: str) -> str | None:
        path = self._file(key)
        if path is None or not path.exists():
            return None
        return json.loads(path.read_text("utf-8"))

    def _ask_and_keep(self, key: str, request: Request, keep: Callable[[str], bool], stopped: Event) -> str:
        answer = self._ask(request, stopped)
        path = self._file(key)
        if path is not None and keep(answer):
            write_lines(path, [json.dumps(answer)])
        return answer

    def _ask(self, request: Request, stopped: Event) -> str:
        """Send one request until it is answered or refused, the tries are used up or ``stopped`` is set."""
        calls: Any = self._client.chat.completions if "messages" in request else self._client.completions
        import openai
        from tenacity import Retrying, retry_if_exception, sleep_using_event, stop_after_attempt, stop_when_event_set

        retrying = Retrying(
            retry=retry_if_exception(_may_pass),
            stop=stop_after_attempt(self.tries) | stop_when_event_set(stopped),
            sleep=sleep_using_event(stopped),
            wait=_seconds_to_wait,
            reraise=True,
        )
        # Without the cause: the library's errors hold the request and, in it, the key.
        try:
            reply = retrying(calls.create, model=self.model, **request)
        except openai.APIStatusError as error:
            failure = self._failure(error)
        except openai.APIConnectionError as error:
            kind = "did not answer in time" if isinstance(error, openai.APITimeoutError) else "cannot be reached"
            failure = ConnectionError(f"{self._where} {kind} ({self.tries} tries); check the server and its base URL")
        except (openai.APIError, json.JSONDecodeError) as error:
            failure = self._no_answer(error)
        else:
            return self._text(request, reply)
        raise failure from None

    def _text(self, request: Request, reply: Any) -> str:
        try:
            choice = reply.choices[0]
            text = choice.message.content if "messages" in request else choice.text
        except (AttributeError, IndexError, TypeError):
            raise self._no_answer(reply) from None
        return text or ""

    def _failure(self, error: Any) -> Exception:
        status, said = error.status_code, self._redacted(error.message)[:300]
        if _may_pass(error):
            return ConnectionError(f"{self._where} answers {status} ({self.tries} tries): {said}; try again later")
        if status in (400, 422):
            return RefusedError(f"{self._where} refuses a request ({status}): {said}; correct it")
        return ValueError(f"{self._where} answers {status}: {said}; {_FIXES.get(status, 'check the server')}")

    def _no_answer(self, reply: object) -> ValueError:
        said = self._redacted(str(reply))[:200]
        return ValueError(f"{self._where} sends no answer of the OpenAI protocol: {said}; check the base URL")

    @property
    def _where(self) -> str:
        return f"model {self.model!r} at {self._client.base_url}"

    def _redacted(self, text: str) -> str:
        """What a server says, on one line and without the key, which some repeat."""
        key = os.environ.get(_KEY)
        text = " ".join(text.split())
        return text.replace(key, "***") if key else text


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may be answered later."""
    import openai

    if isinstance(error, openai.APIStatusError):
        # A spent budget has the status of a rate limit, and waiting does not fill it.
        spent = error.code == "insufficient_quota"
        return error.status_code >= 500 or (error.status_code in (408, 409, 429) and not spent)
    return isinstance(error, openai.APIConnectionError)


def _seconds_to_wait(state: "RetryCallState") -> float:
    """What the server asks for, else about 1, 2, 4 … seconds."""
    from tenacity import wait_random_exponential

    error = state.outcome and state.outcome.exception()
    response = getattr(error, "response", None)
    asked = response.headers.get("retry-after", "") if response is not None else ""
    if asked.isdigit():
        return min(float(asked), _LONGEST_WAIT)
    return wait_random_exponential(max=_LONGEST_WAIT)(state)
