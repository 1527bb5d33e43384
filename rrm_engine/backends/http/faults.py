"""What can go wrong between us and a server, in three kinds: ask again, do not, and too long."""

import json
from typing import Any

import httpx2
import openai

from rrm_engine.errors import RrmError

AGAIN = frozenset({408, 409, 425, 429})  # and all from 500 on
TOO_LONG = ("context length", "context_length", "maximum context", "max_model_len", "too many tokens")
LONGEST_DELAY_S = 30.0
LONGEST = 300  # characters of what a server said


class Broken(Exception):
    """An attempt has failed, and another one may not. ``delay_s`` is what the server asks to wait before it."""

    def __init__(self, why: str, delay_s: float = 0.0) -> None:
        super().__init__(why)
        self.delay_s = delay_s


class TooLong(Exception):
    """The server says that the context is longer than one may be."""


def fault_of(error: Exception) -> Exception:
    """The fault that an exception of the client stands for; what is none of these is returned as it is: a bug."""
    if isinstance(error, Broken | TooLong | RrmError):
        return error
    if isinstance(error, openai.APIStatusError):
        return _of_status(error)
    if isinstance(error, openai.APITimeoutError | httpx2.TimeoutException):
        return Broken("it has sent nothing for --request-timeout seconds")
    if isinstance(error, openai.APIConnectionError | httpx2.TransportError):
        return Broken(_said(error.__cause__ or error))
    if isinstance(error, openai.APIError):  # an error in the middle of a stream
        return TooLong(error.message) if _too_long(error.message) else Broken(error.message[:LONGEST])
    if isinstance(error, openai.OpenAIError | httpx2.HTTPError | json.JSONDecodeError | UnicodeDecodeError):
        return Broken(f"what it sends cannot be read: {_said(error)}")
    return error


def _of_status(error: openai.APIStatusError) -> Exception:
    said = _message(error.body) or error.message
    if error.status_code in AGAIN or error.status_code >= 500:
        return Broken(f"it answers {error.status_code}: {said[:LONGEST]}", _delay(error.response.headers))
    if _too_long(said):
        return TooLong(said)
    hint = "; name the variable that holds the key with --api-key-env" if error.status_code in (401, 403) else ""
    return RrmError(f"the server refuses with {error.status_code}: {said[:LONGEST]}{hint}")


def _message(body: Any) -> str:
    """What an error's body says, of the shapes there are."""
    while isinstance(body, dict):
        body = body.get("message") or body.get("error") or body.get("detail")
    return body if isinstance(body, str) else ""


def _delay(headers: Any) -> float:
    try:
        return min(max(float(headers.get("retry-after", 0)), 0.0), LONGEST_DELAY_S)
    except ValueError:  # a date
        return 0.0


def _too_long(text: str) -> bool:
    return any(words in text.lower() for words in TOO_LONG)


def _said(error: BaseException) -> str:
    return (str(error) or type(error).__name__)[:LONGEST]
