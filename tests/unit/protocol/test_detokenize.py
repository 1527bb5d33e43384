"""Text as tokens come, against the full decode, for every kind of tokenizer; events cut out of the middle of tokens."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_tokenizers import BYTES, KINDS
from tokenizers import decoders
from transformers import PreTrainedTokenizerFast

from rrm_engine.backends.tokens import NodeTokens
from rrm_engine.graph.paths import ROOT
from rrm_engine.protocol.detokenize import Detokenizer
from rrm_engine.protocol.encode import TextEncoder

BROKEN = [0xE4, 0xB8, 0xAD, 0xC3, 0xA9, 0x0A, 0xFF, 0x41, 0xF0, 0x9F]


def pools(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Ids to draw from: any, one beyond the vocabulary among them; those that make up broken characters; added ones."""
    everything = list(range(len(tokenizer) + 1))
    vocabulary = tokenizer.get_vocab()  # in no order
    alphabet = [token for name, token in vocabulary.items() if len(name) == 1 and not name.isascii()]
    broken = [vocabulary[BYTES[byte]] for byte in BROKEN if BYTES[byte] in vocabulary]
    spaced = [token for name, token in vocabulary.items() if name in " ▁.,?'Ġs"]
    return [everything, everything[-8:], *(sorted(pool) for pool in (broken, alphabet, spaced) if pool)]


def tokens_of(tokenizer: PreTrainedTokenizerFast) -> st.SearchStrategy[list[int]]:
    """Stretches from one pool after another."""
    stretches = [st.lists(st.sampled_from(pool), max_size=8) for pool in pools(tokenizer)]
    return st.lists(st.one_of(stretches), max_size=6).map(lambda parts: [token for part in parts for token in part])


def streamed(tokenizer: Any, tokens: list[int], skip: bool) -> list[str]:
    stream = Detokenizer(tokenizer, skip_special_tokens=skip)
    return [*(stream.step(token) for token in tokens), stream.end()]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_full_decode(kind: str) -> None:
    tokenizer = KINDS[kind]()

    @given(tokens=tokens_of(tokenizer), skip=st.booleans())
    def holds(tokens: list[int], skip: bool) -> None:
        pieces = streamed(tokenizer, tokens, skip)
        assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=skip)
        for cut in range(len(tokens)):  # what was given out stays, whatever follows
            assert tokenizer.decode(tokens[:cut], skip_special_tokens=skip).startswith("".join(pieces[:cut]))

    holds()


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_text_is_not_held_back(kind: str) -> None:
    """An event is read in the step that writes its closing brace."""
    tokenizer = KINDS[kind]()
    tokens = tokenizer.encode('x {"type":"done"}', add_special_tokens=False)
    assert "".join(streamed(tokenizer, tokens, False)[:-1]) == tokenizer.decode(tokens)


def test_the_library_s_own_stream_is_no_use() -> None:
    """Why there is one of ours: the run of bytes that this test is named after in bug reports."""
    tokenizer = KINDS["byte_fallback"]()
    tokens = [tokenizer.convert_tokens_to_ids(name) for name in ("<0x0A>", "<0xE4>", "▁the")]
    stream = decoders.DecodeStream(skip_special_tokens=False)
    with pytest.raises(Exception, match=r"[Ii]nvalid prefix"):
        for token in tokens:
            stream.step(tokenizer.backend_tokenizer, token)
    assert "".join(streamed(tokenizer, tokens, False)) == tokenizer.decode(tokens) == "\ufffd\ufffd the"


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_endless_broken_bytes_cost_the_same_each(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids handed to the library grow with the tokens, not with their square."""
    tokenizer = KINDS[kind]()
    core, decoded = tokenizer.backend_tokenizer, 0

    class Counting:
        decoder, model = core.decoder, core.model

        def __getattr__(self, name: str) -> Any:
            return getattr(core, name)

        def decode(self, ids: list[int], **settings: Any) -> str:
            nonlocal decoded
            decoded += len(ids)
            return str(core.decode(ids, **settings))

    vocabulary = tokenizer.get_vocab()
    broken = vocabulary["ä"] if kind == "byte_level" else vocabulary["<0xE4>"]
    tokens = [broken] * 3000 + [vocabulary["{"]] * 3000
    counted = SimpleNamespace(backend_tokenizer=Counting(), clean_up_tokenization_spaces=False)
    assert "".join(streamed(counted, tokens, False)) == tokenizer.decode(tokens)
    assert decoded < 6 * len(tokens)


# ---- events that end in the middle of a token


def node_after(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> NodeTokens[Any]:
    prompt = [0, 0, 0]
    sequence: Any = SimpleNamespace(tokens=[*prompt, *tokens])
    node = NodeTokens(ROOT, sequence, Detokenizer(tokenizer), first=len(prompt))
    for i, token in enumerate(tokens):
        node.wrote(token, last=i == len(tokens) - 1)
    return node


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith(("byte", "tik"))])
def test_a_cut_keeps_the_text_up_to_it(kind: str) -> None:
    """The kept tokens and the rest of the cut one spell the text up to the boundary and the white space after it."""
    tokenizer = KINDS[kind]()
    encode = TextEncoder(tokenizer)

    @given(tokens=tokens_of(tokenizer), place=st.floats(0, 1))
    @example(tokens=tokenizer.encode('{"a":1}\n{"b":2} né}中🙂 <s>', add_special_tokens=False), place=0.5)
    def holds(tokens: list[int], place: float) -> None:
        node = node_after(tokenizer, tokens)
        text = "".join(node.pieces)
        if not text:
            return
        boundary = max(1, round(place * len(text)))
        keep, cut = node.split(boundary, encode)
        kept = node.sequence.tokens[node.first : keep]
        assert kept == tokens[: len(kept)]
        result = tokenizer.decode([*kept, *cut])
        if "\ufffd" not in text:  # a broken character is not written again byte by byte
            assert result.startswith(text[:boundary]) and not result[boundary:].strip()

    holds()


@pytest.mark.parametrize("kind", ["byte_fallback", "byte_fallback_first", "byte_fallback_bare", "byte_level"])
def test_going_on_after_a_cut_is_the_whole_text(kind: str) -> None:
    tokenizer = KINDS[kind]()
    added = tokenizer.convert_tokens_to_ids("<think>")
    tokens = tokenizer.encode('{"type":"done"}', add_special_tokens=False)
    both = tokenizer.convert_tokens_to_ids("}}" if "}}" in tokenizer.get_vocab() else "}")
    node = node_after(tokenizer, [*tokens, both, added])
    boundary = len('{"type":"done"}')
    keep, cut = node.split(boundary, TextEncoder(tokenizer))
    assert tokenizer.decode([*node.sequence.tokens[node.first : keep], *cut, *tokens]).startswith('{"type":"done"}')
