"""What the servers can do, found out by asking them before the first row."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import openai

from rrm_engine.backends.http.faults import Broken, TooLong, fault_of
from rrm_engine.backends.http.pool import Replica
from rrm_engine.errors import RrmError

UNSUPPORTED = (400, 404, 405, 415, 422, 501)
WORD = "zq7kvrx"
WORD_TOKENS = 16  # enough for it
LOOK = 8  # tokens asked for, to compare the server's text with our own tokenizer's


@dataclass(slots=True)
class Found:
    """``longest`` is the longest context, None if no replica says; ``models`` are the names served."""

    longest: int | None = None
    models: list[str] = field(default_factory=list)


def patient(replica: Replica) -> Any:
    """Its client, which asks again: a connection that was kept may have been closed meanwhile."""
    return replica.client.with_options(max_retries=3)


async def find_models(replicas: Sequence[Replica]) -> Found:
    """Ask every replica what it serves. Raises RrmError, naming the replica, for one that does not answer."""
    found = Found()
    for replica in replicas:
        for model in await _models(replica):
            found.models.append(str(getattr(model, "id", "")))
            longest = getattr(model, "max_model_len", None)
            if type(longest) is int:
                found.longest = min(longest, found.longest or longest)
    return found


async def _models(replica: Replica) -> list[Any]:
    try:
        return list((await patient(replica).models.list()).data or ())
    except openai.APIStatusError as error:
        if error.status_code not in (401, 403):  # it lives, and has no list
            return []
        raise RrmError(f"--base-urls {replica.name}: {fault_of(error)}") from error
    except Exception as error:
        fault = fault_of(error)
        if not isinstance(fault, Broken):
            raise
        raise RrmError(
            f"--base-urls {replica.name}: no server answers there ({fault}): start it, and wait until it is healthy"
        ) from error


async def returned_ids(replica: Replica, model: str, prompt: list[int]) -> tuple[list[int], str] | None:
    """The ids and the text of some tokens after ``prompt``; None where ids are not taken, or not returned, as they
    are.
    """
    extra = {"add_special_tokens": False, "return_token_ids": True}
    try:
        answer = await patient(replica).completions.create(
            model=model, prompt=prompt, max_tokens=LOOK, temperature=0, extra_body=extra
        )
    except openai.APIStatusError as error:
        if error.status_code in UNSUPPORTED:
            return None
        raise RrmError(f"--base-urls {replica.name}: {fault_of(error)}") from error
    except Exception as error:
        raise RrmError(f"--base-urls {replica.name}: {fault_of(error)}") from error
    choice = answer.choices[0] if answer.choices else None
    ids, sent = getattr(choice, "token_ids", None), getattr(choice, "prompt_token_ids", None)
    if not isinstance(ids, list) or (sent is not None and sent != prompt):
        return None
    return ids, str(getattr(choice, "text", ""))


class Refusal(str):
    """What a server says against a request; an answer may be a text too."""


async def takes(replica: Replica, create: Any, options: dict[str, Any], **base: Any) -> str | None:
    """Whether a request with ``options`` in its body is taken: None, or what the server says against it."""
    answer = await _answer(replica, create, options, **base)
    if isinstance(answer, Refusal):
        return answer
    if base.get("stream"):
        await answer.close()
    return None


async def keeps_to(replica: Replica, create: Any, options: dict[str, Any], **base: Any) -> bool:
    """Whether an answer under a grammar of one word, which no model writes by itself, is that word."""
    base |= {name: WORD_TOKENS for name in ("max_tokens", "max_completion_tokens") if name in base}
    grammar = {"grammar": f'start: "{WORD}"'}
    answer = await _answer(replica, create, {**options, "structured_outputs": grammar}, **base)
    choice = answer.choices[0] if getattr(answer, "choices", None) else None
    message = getattr(choice, "message", None)
    text = getattr(choice, "text", None) if message is None else message.content
    return isinstance(text, str) and text.strip() == WORD


async def prompt_tokens(replica: Replica, create: Any, options: dict[str, Any], **base: Any) -> int | str | None:
    """How many tokens the server counts in a prompt, None if it does not say; or what it says against ``options``."""
    answer = await _answer(replica, create, options, **base)
    if isinstance(answer, Refusal):
        return answer
    count = getattr(getattr(answer, "usage", None), "prompt_tokens", None)
    return count if type(count) is int else None


async def _answer(replica: Replica, create: Any, options: dict[str, Any], **base: Any) -> Any:
    """The answer to a request with ``options`` in its body; what the server says, if it does not take them."""
    try:
        return await create(**base, extra_body=options)
    except openai.APIStatusError as error:
        if error.status_code in UNSUPPORTED and not isinstance(fault_of(error), TooLong):
            return Refusal(fault_of(error))
        raise RrmError(f"--base-urls {replica.name}: {fault_of(error)}") from error
    except Exception as error:
        raise RrmError(f"--base-urls {replica.name}: {fault_of(error)}") from error


async def refused(replica: Replica, create: Any, options: dict[str, Any], **base: Any) -> dict[str, str]:
    """Which of ``options`` the server does not take, and what it says against each.

    Raises RrmError if it refuses the request without any.
    """
    if await takes(replica, create, options, **base) is None:
        return {}
    if (why := await takes(replica, create, {}, **base)) is not None:
        raise RrmError(f"--base-urls {replica.name}: {why}")
    said = {name: await takes(replica, create, {name: value}, **base) for name, value in options.items()}
    return {name: why for name, why in said.items() if why is not None}
