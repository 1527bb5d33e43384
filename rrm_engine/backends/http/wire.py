"""What is sent to a server and read from its stream, for each of the three APIs."""

from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from rrm_engine.backends.http.faults import Broken
from rrm_engine.errors import RrmError

Message = dict[str, str]
# What has an assistant's last message gone on with, in place of a new one: vLLM's and SGLang's names.
GOING_ON = {"continue_final_message": True, "add_generation_prompt": False}
# Why a stream is over, by what the servers call it.
ENDS = {"stop": "eos", "eos": "eos", "tool_calls": "eos", "function_call": "eos", "length": "length"}


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request, as its server counts them; ``cached`` are those of the prompt that it had."""

    prompt: int = 0
    decoded: int = 0
    cached: int | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What one chunk of a stream brings. ``end`` is ``eos`` or ``length`` in the last one with text, or after it."""

    text: str = ""
    reasoning: str = ""
    tokens: tuple[int, ...] = ()
    end: str | None = None
    usage: Usage | None = None

    def by_token(self) -> "Sequence[Delta]":
        """The same, one token after another, for an event may end between two of them."""
        if len(self.tokens) < 2:
            return (self,)
        *first, last = self.tokens
        return [*(Delta(tokens=(token,)) for token in first), replace(self, text="", tokens=(last,))]


@dataclass(frozen=True, slots=True)
class Ask:
    """What a phase is asked for: after ``prompt``, at most ``budget`` tokens. ``sampling`` are settings of the API,
    ``extra`` are those of single servers; ``grammar`` holds from the phase's first token on.
    """

    prompt: list[int] | list[Message]
    budget: int
    sampling: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    grammar: str | None = None


@dataclass(slots=True)
class Received:
    """What a phase has got so far; another replica goes on from there."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    count: int = 0  # tokens; chunks where the server gives no ids

    def add(self, delta: Delta) -> None:
        self.tokens += delta.tokens
        self.text += delta.text
        self.count += len(delta.tokens) or bool(delta.text or delta.reasoning)


class Api(Protocol):
    """How one of the APIs is spoken. ``continues``: a server can go on in the middle of what was received."""

    @property
    def continues(self) -> bool: ...

    def read(self, client: Any, model: str, ask: Ask, received: Received) -> AsyncGenerator[Delta, None]:
        """The chunks of an answer. Raises what the client raises, and Broken for what is not of the API."""


class TokenApi:
    """``/v1/completions`` with token ids both ways: the server's KV of a node that goes on is found by its ids."""

    continues = True

    async def read(self, client: Any, model: str, ask: Ask, received: Received) -> AsyncGenerator[Delta, None]:
        """See Api. A grammar cannot be entered in its middle: what goes on elsewhere goes on without it."""
        extra = {"add_special_tokens": False, "return_token_ids": True, **ask.extra}
        if ask.grammar is not None and not received.count:
            extra["structured_outputs"] = {"grammar": ask.grammar}
        stream = await client.completions.create(
            model=model,
            prompt=[*ask.prompt, *received.tokens],
            max_tokens=ask.budget - received.count,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra,
            **ask.sampling,
        )
        async with stream:
            async for chunk in stream:
                with _shape():
                    delta = _of_completion(chunk)
                yield delta


@dataclass(frozen=True, slots=True)
class ChatApi:
    """``/v1/chat/completions``: the conversation is sent each time, with its last message open where that is the
    assistant's.
    """

    continues: bool = True

    async def read(self, client: Any, model: str, ask: Ask, received: Received) -> AsyncGenerator[Delta, None]:
        """See Api."""
        messages, extra = [*ask.prompt], dict(ask.extra)
        begun = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
        if begun or received.count:
            messages.append({"role": "assistant", "content": begun + received.text})
            extra |= GOING_ON
        if ask.grammar is not None and not received.count:
            extra["structured_outputs"] = {"grammar": ask.grammar}
        limit = extra.pop("limit", "max_tokens")
        stream = await client.chat.completions.create(
            model=model,
            messages=messages,
            stream=True,
            extra_body=extra,
            **{limit: ask.budget - received.count},
            **ask.sampling,
        )
        async with stream:
            async for chunk in stream:
                with _shape():
                    delta = _of_chat(chunk)
                yield delta


class ResponsesApi:
    """``/v1/responses``: the conversation is sent each time, and nothing is kept there."""

    continues = False

    async def read(self, client: Any, model: str, ask: Ask, received: Received) -> AsyncGenerator[Delta, None]:
        """See Api."""
        stream = await client.responses.create(
            model=model,
            input=ask.prompt,
            max_output_tokens=ask.budget,
            stream=True,
            extra_body=ask.extra,
            **ask.sampling,
        )
        async with stream:
            async for event in stream:
                with _shape():
                    delta = _of_response(event)
                if delta is not None:
                    yield delta


class _shape:
    """What a server sends may be JSON and yet nothing of its API."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, AttributeError | TypeError | KeyError | IndexError | ValueError) and not isinstance(
            error, RrmError
        ):
            raise Broken("what it sends is nothing of its API") from error


def _of_completion(chunk: Any) -> Delta:
    usage = _usage(chunk.usage)
    if not chunk.choices:
        return Delta(usage=usage)
    choice = chunk.choices[0]
    ids = getattr(choice, "token_ids", None) or ()
    return Delta(choice.text or "", tokens=_ids(ids), end=_end(choice.finish_reason), usage=usage)


def _of_chat(chunk: Any) -> Delta:
    usage = _usage(chunk.usage)
    if not chunk.choices:
        return Delta(usage=usage)
    choice, delta = chunk.choices[0], chunk.choices[0].delta
    thought = getattr(delta, "reasoning", None) or getattr(delta, "reasoning_content", None) or ""
    return Delta(_text(delta.content), _text(thought), end=_end(choice.finish_reason), usage=usage)


def _of_response(event: Any) -> Delta | None:
    match event.type:
        case "response.output_text.delta":
            return Delta(_text(event.delta))
        case "response.reasoning_text.delta":
            return Delta(reasoning=_text(event.delta))
        case "response.completed":
            return Delta(end="eos", usage=_response_usage(event.response.usage))
        case "response.incomplete":
            details = event.response.incomplete_details
            if details is not None and details.reason not in (None, "max_output_tokens"):
                raise RrmError(f"the server ended the answer: {details.reason}")
            return Delta(end="length", usage=_response_usage(event.response.usage))
        case "response.failed":
            error = event.response.error
            raise Broken(f"the response failed: {error.message if error is not None else 'it does not say why'}")
        case "error":
            raise Broken(str(event.message))
    return None


def _text(value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise TypeError
    return value or ""


def _ids(values: Iterable[Any]) -> tuple[int, ...]:
    found = tuple(values)
    if any(type(one) is not int for one in found):
        raise TypeError
    return found


def _end(reason: str | None) -> str | None:
    if reason is None:
        return None
    if reason == "content_filter":
        raise RrmError("the server ended the answer: content_filter")
    if reason not in ENDS:  # "abort" and the like
        raise Broken(f"it ended the answer: {reason}")
    return ENDS[reason]


def _usage(usage: Any) -> Usage | None:
    if usage is None:
        return None
    details = getattr(usage, "prompt_tokens_details", None)
    cached = getattr(details, "cached_tokens", None) if details is not None else None
    return Usage(usage.prompt_tokens or 0, usage.completion_tokens or 0, cached)


def _response_usage(usage: Any) -> Usage | None:
    if usage is None:
        return None
    details = getattr(usage, "input_tokens_details", None)
    return Usage(usage.input_tokens or 0, usage.output_tokens or 0, getattr(details, "cached_tokens", None))
