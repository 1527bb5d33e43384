"""Token ids of prompts and turns, derived from a tokenizer's own chat template.

A template is rendered with marks in the places of what is said, once for each shape of conversation; the texts, which
the template never sees, are put in as `Content`. So no text forges a turn, and white space around a text, which some
templates strip and others keep, is left out.

A turn that is appended to a running sequence is cut out of the rendering of the whole conversation and tokenised alone,
so that the ids already in the KV cache stay as they are. They are those of the whole conversation where its template
leaves earlier turns as they were. Where it does not (it drops earlier thinking, as Qwen3's does, or writes the system
text into the last user turn, as Mistral's does), earlier turns stay in the sequence as they were read and written.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from typing import Any, Final

from rrm_engine.errors import RrmError
from rrm_engine.protocol.encode import Content, TextEncoder
from rrm_engine.protocol.thinking import Marks, find_marks

_SWITCHES: Final = ("enable_thinking", "thinking")
_SYSTEM: Final = "rrm-system-0x"
_AS_IT_IS: Final = "rrm \"a\" <b> & {c} 'd'\n\n\\e \u00e9 rrm"  # a template must not change what is said


class ChatFormat:
    """How a model's conversations are written, for a Hugging Face fast tokenizer.

    ``eos_ids``: the end-of-sequence ids of the model's generation config, added to the tokenizer's own. ``encode``
    makes ids of texts, ``marks`` are what the model's thinking stands between.

    A tokenizer without a chat template gets a plain format: the system text, then ``User: ...`` and
    ``Assistant:`` paragraphs with a blank line between them.

    Raises RrmError if the template cannot be used: it fails, or it loses, changes or reorders what was said.
    """

    def __init__(self, tokenizer: Any, eos_ids: Iterable[int] = ()) -> None:
        self.tokenizer = tokenizer
        own = tokenizer.eos_token_id
        self.eos_ids: frozenset[int] = frozenset(eos_ids) | ({own} if own is not None else set())
        self.plain: bool = not tokenizer.chat_template
        source = "" if self.plain else self._source()
        self.encode = TextEncoder(tokenizer, source)
        self.marks: Marks = find_marks(source)
        self._rendered: dict[tuple[bool, int, bool], str] = {}
        self._check()

    def opening(self, system: str, user: str, thinking: bool = False) -> list[int]:
        """A whole prompt: system text (may be ""), user turn, and the beginning of the assistant's turn."""
        system, user = system.strip(), user.strip()
        if system and not self.has_system_role:
            system, user = "", f"{system}\n\n{user}"
        return self.encode(_filled(self._conversation(bool(system), 0, thinking), {_SYSTEM: system, _user(0): user}))

    def turn(
        self, user: str, thinking: bool = False, *, closed: bool = False, turns: int = 1, system: bool = False
    ) -> list[int]:
        """Ids to append to an assistant's unfinished turn: its end, a user turn, and the next beginning.

        ``closed``: the assistant wrote the first of them itself, see `closes_with`. ``turns`` counts the user's turns
        so far, ``system`` says whether the conversation began with a system text.
        """
        return self.encode(self._turn(user, thinking, turns, system), continues=True)[int(closed) :]

    def turn_around(
        self,
        user: str,
        marks: Collection[str],
        thinking: bool = False,
        *,
        closed: bool = False,
        turns: int = 1,
        system: bool = False,
    ) -> list[list[int] | str]:
        """As ``turn``, with tokens of one's own to be put in place of ``marks``, single characters in ``user``.

        Returns the ids of the texts between the marks, each tokenised alone, and the marks, in order.
        """
        found: list[list[int] | str] = []
        texts: list[str] = []
        for text in self._turn(user, thinking, turns, system):
            for part in re.split(f"([{''.join(marks)}])", text) if isinstance(text, Content) else [text]:
                if part in marks:
                    found += [self.encode(texts, continues=True), part]
                    texts = []
                else:
                    texts.append(Content(part) if isinstance(text, Content) else part)
        found.append(self.encode(texts, continues=True))
        if closed and isinstance(found[0], list):
            del found[0][0]
        return [part for part in found if part]

    def opens(self, text: str) -> list[int]:
        """Ids of ``text`` as the beginning of an assistant's turn, to append to those of an opening or a turn."""
        return self.encode([Content(f" {text}" if self.plain else text)], continues=True) if text else []

    def closes_with(self, token: int) -> bool:
        """Whether the template ends an assistant's turn with ``token`` and nothing before it."""
        return self.turn("x")[0] == token

    @cached_property
    def has_thinking(self) -> bool:
        """Whether the template knows thinking: it has a switch for it, or opens a thinking block itself."""
        return self.can_switch_thinking or self.opens_thinking(True)

    @cached_property
    def can_switch_thinking(self) -> bool:
        """Whether the template writes another prompt where the model is not to think."""
        return self._conversation(False, 0, True) != self._conversation(False, 0, False)

    def opens_thinking(self, thinking: bool) -> bool:
        """Whether the prompt ends inside a thinking block, so that the model's text begins there."""
        return self.marks.left_open(self._conversation(False, 0, thinking).rpartition(_user(0))[2])

    @cached_property
    def has_system_role(self) -> bool:
        """Whether the template takes a system message; if not, its text goes into the first user turn."""
        if self.plain:
            return True
        try:
            return _SYSTEM in self._conversation(True, 0, False)
        except RrmError:
            return False

    def _turn(self, user: str, thinking: bool, turns: int, system: bool) -> list[str]:
        """The texts after the assistant's last one, up to where it goes on."""
        text = ""
        for with_system in dict.fromkeys((system and self.has_system_role, False)):
            text = self._conversation(with_system, turns, thinking).rpartition(_assistant(turns - 1))[2]
            if _SYSTEM not in text:  # some templates write it in front of the last user turn
                break
        return _filled(text, {_user(turns): user.strip()})

    def _conversation(self, system: bool, turns: int, thinking: bool) -> str:
        """A conversation of ``turns`` answered user turns and one more, with a mark for each text; kept."""
        key = system, turns, thinking
        if key not in self._rendered:
            self._rendered[key] = self._plain_text(*key) if self.plain else self._render(*key)
        return self._rendered[key]

    def _render(self, system: bool, turns: int, thinking: bool) -> str:
        messages = [_message("system", _SYSTEM)] if system else []
        for i in range(turns):
            messages += [_message("user", _user(i)), _message("assistant", _assistant(i))]
        return self._apply([*messages, _message("user", _user(turns))], thinking)

    def _plain_text(self, system: bool, turns: int, thinking: bool) -> str:
        begin = [self.tokenizer.bos_token or "", f"{_SYSTEM}\n\n" if system else ""]
        said = (f"User: {_user(i)}\n\nAssistant: {_assistant(i)}\n\n" for i in range(turns))
        return "".join([*begin, *said, f"User: {_user(turns)}\n\nAssistant:"])

    def _apply(self, messages: list[dict[str, str]], thinking: bool = False, prompt: bool = True) -> str:
        switches: dict[str, Any] = dict.fromkeys(_SWITCHES, thinking)
        try:
            return str(
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **switches)
            )
        except Exception as error:  # a template is a program of the checkpoint's
            raise self._unusable(str(error) or type(error).__name__) from error

    def _source(self) -> str:
        try:
            return str(self.tokenizer.get_chat_template())
        except ValueError as error:  # several templates, none of them for plain conversations
            raise self._unusable(str(error)) from error

    def _check(self) -> None:
        if self.plain:
            return
        system, (first, second), answer = self.has_system_role, (_user(0), _user(1)), _assistant(0)
        said = [*([_SYSTEM] if system else []), first]
        if not _in_order(self._conversation(system, 0, False), said):
            raise self._unusable("a prompt does not hold the system text and then the user's, each once")
        if not _in_order(self._conversation(False, 1, False), [first, answer, second]):
            raise self._unusable("a conversation does not hold the user's text, then the assistant's, then the user's")
        if _AS_IT_IS not in self._apply([_message("user", _AS_IT_IS)]):
            raise self._unusable("it changes what the user says")

    def _unusable(self, why: str) -> RrmError:
        name = getattr(self.tokenizer, "name_or_path", "") or "this tokenizer"
        return RrmError(f"the chat template of {name} cannot be used: {why}")


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _user(turn: int) -> str:
    return f"rrm-user-{turn}x"


def _assistant(turn: int) -> str:
    return f"rrm-assistant-{turn}x"


def _filled(text: str, said: Mapping[str, str]) -> list[str]:
    """``text`` with what was said in the places of the marks."""
    parts = re.split("(" + "|".join(map(re.escape, said)) + ")", text)
    return [Content(said[part]) if part in said else part for part in parts]


def _in_order(text: str, said: list[str]) -> bool:
    places = [text.find(one) for one in said]
    return -1 not in places and places == sorted(places) and all(text.count(one) == 1 for one in said)
