"""The embedded model's tokenizer: 256 bytes, whole words, chunks of event lines; no merges.

A regular expression cuts text into chunks, words (with the space before them) and single characters. What the
vocabulary knows as a whole becomes one token, everything else is spelled in bytes. No chunk reaches beyond the
closing brace of an event, so that text may be encoded in the pieces in which a run produces it.
"""

import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from embedded.transcripts import CHAT_TEMPLATE, STYLE
from embedded.wording import word_list

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHUNKS = (
    '{"type":"child","id":"', '","task":"', '","depends_on":["', '"]}', '"}', '{"type":"await","children":["', '","',
    '"],"rule":"sum"}', '{"type":"atomic","answer":"FINAL: ', "FINAL: ", " = ", "grow ", "pair ", "mult ", "sum ",
    "; ", " *", " +", "..:",
)  # fmt: skip
ROLES = ("system", "user", "assistant")
WORD = " ?[A-Za-z]+"


def byte_level(text: str) -> str:
    """``text`` in the printable alphabet of byte-level vocabularies."""
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return "".join(piece for piece, _ in pieces)


def vocabulary() -> list[str]:
    """Every token but the special ones, in id order: bytes, chunks, words."""
    texts = [re.sub(r"\{\w\}", "1", text) for text in word_list()]
    texts += [STYLE["system"]["direct"], STYLE["system"]["recursive"], *(f" {noun}" for noun in texts), *ROLES]
    words = {word for text in texts for word in re.findall(WORD, text) if len(word) > 1}
    entries = [*(byte_level(chunk) for chunk in CHUNKS), *sorted(byte_level(word) for word in words | {" x"})]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*alphabet, *(entry for entry in dict.fromkeys(entries) if entry not in alphabet)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    tokens = vocabulary()
    vocab = {token: index for index, token in enumerate([*tokens, *SPECIALS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    chunks = "|".join(re.escape(chunk) for chunk in sorted(CHUNKS, key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"{chunks}|{WORD}|[\\s\\S]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
