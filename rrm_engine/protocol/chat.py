"""Token ids of prompts and turns, derived from a tokenizer's own chat template.

A turn that is appended to a running sequence is cut out of a rendered conversation and tokenised alone, so
that the ids already in the KV cache stay as they are, also with templates that drop earlier thinking.
"""

import re
from collections.abc import Collection, Iterable
from functools import cached_property
from typing import Any, Final

import jinja2

from rrm_engine.errors import RrmError
from rrm_engine.protocol.encode import TextEncoder
from rrm_engine.protocol.parser import THINK_CLOSE, THINK_OPEN

_SWITCHES: Final = ("enable_thinking", "thinking")
_SYSTEM: Final = "rrm-system-0a1b"
_USER: Final = "rrm-user-2c3d"
_ASSISTANT: Final = "rrm-assistant-4e5f"


class ChatFormat:
    """How a model's conversations are written, for a Hugging Face fast tokenizer.

    ``eos_ids``: the end-of-sequence ids of the model's generation config, added to the tokenizer's own.

    A tokenizer without a chat template gets a plain format: the system text, then ``User: ...`` and
    ``Assistant:`` paragraphs with a blank line between them.

    Raises RrmError if the template cannot be used: it fails, or it loses or reorders what was said.
    """

    def __init__(self, tokenizer: Any, eos_ids: Iterable[int] = ()) -> None:
        self.tokenizer = tokenizer
        own = tokenizer.eos_token_id
        self.eos_ids: frozenset[int] = frozenset(eos_ids) | ({own} if own is not None else set())
        self.plain: bool = not tokenizer.chat_template
        self.encode = TextEncoder(tokenizer, "" if self.plain else tokenizer.get_chat_template())
        self._check()

    def opening(self, system: str, user: str, thinking: bool = False) -> list[int]:
        """A whole prompt: system text (may be ""), user turn, and the beginning of the assistant's turn."""
        return self._encode(self._opening_text(system, user, thinking))

    def turn(self, user: str, thinking: bool = False, after_eos: bool = False) -> list[int]:
        """Ids to append to an assistant's unfinished turn: its end, a user turn, and the next beginning.

        ``after_eos``: the assistant ended its turn itself, with one of ``eos_ids``, which is not repeated.
        """
        ids = self._encode(self._turn_text(user, thinking))
        return ids[1:] if after_eos and ids and ids[0] in self.eos_ids else ids

    def turn_around(
        self, user: str, marks: Collection[str], thinking: bool = False, after_eos: bool = False
    ) -> list[list[int] | str]:
        """As ``turn``, with tokens of one's own to be put in place of ``marks``, single characters in ``user``.

        Returns the ids of the texts between the marks, each tokenised alone, and the marks, in order.
        """
        parts = re.split(f"([{''.join(marks)}])", self._turn_text(user, thinking))
        turn = [part if part in marks else self._encode(part) for part in parts if part]
        if after_eos and not isinstance(turn[0], str) and turn[0][0] in self.eos_ids:
            del turn[0][0]
        return turn

    @cached_property
    def has_thinking(self) -> bool:
        """Whether the template knows thinking: it has a switch for it, or opens a thinking block itself."""
        on, off = (self._opening_text("", _USER, thinking) for thinking in (True, False))
        return on != off or _left_open(on)

    def opens_thinking(self, thinking: bool) -> bool:
        """Whether the prompt ends inside a thinking block, so that the model's text begins there."""
        return _left_open(self._opening_text("", _USER, thinking).rpartition(_USER)[2])

    @cached_property
    def has_system_role(self) -> bool:
        """Whether the template takes a system message; if not, its text goes into the first user turn."""
        try:
            text = self._render([_message("system", _SYSTEM), _message("user", _USER)], False)
        except ValueError:
            return False
        return _SYSTEM in text

    def _opening_text(self, system: str, user: str, thinking: bool) -> str:
        if self.plain:
            bos = self.tokenizer.bos_token or ""
            return f"{bos}{system}\n\nUser: {user}\n\nAssistant:" if system else f"{bos}User: {user}\n\nAssistant:"
        if system and not self.has_system_role:
            return self._render([_message("user", f"{system}\n\n{user}")], thinking)
        messages = [_message("system", system)] if system else []
        return self._render([*messages, _message("user", user)], thinking)

    def _turn_text(self, user: str, thinking: bool) -> str:
        if self.plain:
            return f"\n\nUser: {user}\n\nAssistant:"
        # No system message: some templates write it in front of the last user turn.
        messages = [_message("user", _USER), _message("assistant", _ASSISTANT), _message("user", user)]
        return self._render(messages, thinking).partition(_ASSISTANT)[2]

    def _render(self, messages: list[dict[str, str]], thinking: bool) -> str:
        switches: dict[str, Any] = dict.fromkeys(_SWITCHES, thinking)
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **switches)
        except (jinja2.TemplateError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise self._unusable(str(error)) from error
        return str(text)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _check(self) -> None:
        if self.plain:
            return
        opening = self._opening_text(_SYSTEM, _USER, False)
        if not 0 <= opening.find(_SYSTEM) < opening.find(_USER):
            raise self._unusable("a prompt does not hold the system text and then the user's")
        whole = self._render([_message("user", _USER), _message("assistant", _ASSISTANT)], False)
        if not 0 <= whole.find(_USER) < whole.find(_ASSISTANT):
            raise self._unusable("a conversation does not hold the user's text and then the assistant's")
        if _USER not in self._turn_text(_USER, False):
            raise self._unusable("nothing can follow the assistant's turn")

    def _unusable(self, why: str) -> RrmError:
        name = getattr(self.tokenizer, "name_or_path", "") or "this tokenizer"
        return RrmError(f"the chat template of {name} cannot be used: {why}")


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _left_open(text: str) -> bool:
    return text.rfind(THINK_OPEN) > text.rfind(THINK_CLOSE)
