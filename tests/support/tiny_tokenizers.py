"""A tiny tokenizer of every kind there is, trained in milliseconds, with names for control tokens."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = """{"type":"child","id":"c1","task":"Find the sum of the first 12 odd numbers, isn't it 144 ?","depends_on":[]}
{"type":"await","children":["c1","c2"],"rule":"c1 + c2"}
{"type":"atomic","answer":"So the total is 33. FINAL: 33"}
User: Assistant: system user assistant, the naïve café's answers weren't \\frac{1}{2} ! They're x^2 - 3 .
FINAL: 7 é ü 中文 🙂 and [INST] Answer [/INST] <tool>"""
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
ADDED = ("<think>", "</think>", "  ")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ASCII = [chr(code) for code in range(0x21, 0x7F)]


def _finished(core: Tokenizer, **settings: Any) -> PreTrainedTokenizerFast:
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    core.add_tokens([AddedToken(name, normalized=False) for name in ADDED])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", **settings)


def _bpe(
    size: int, special: Sequence[str] = (), alphabet: Sequence[str] = (), **model: Any
) -> Callable[..., Tokenizer]:
    def train(pieces: Any, normalizer: Any = None, decoder: Any = None, suffix: str = "") -> Tokenizer:
        core = Tokenizer(models.BPE(**model))
        core.normalizer, core.pre_tokenizer = normalizer, pieces
        options: dict[str, Any] = {"end_of_word_suffix": suffix} if suffix else {}
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(special),
            initial_alphabet=list(alphabet),
            show_progress=False,
            **options,
        )
        core.train_from_iterator(TEXT.splitlines() * 3, trainer)  # no token goes over the end of a line
        core.decoder = decoder
        return core

    return train


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2, Qwen, Llama 3."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train = _bpe(400, alphabet=alphabet)
    return _finished(train(pre_tokenizers.ByteLevel(add_prefix_space=False), decoder=decoders.ByteLevel()))


def tiktoken_like() -> PreTrainedTokenizerFast:
    """Whole words first, then merges; bytes inside of a sequence of decoders."""
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+"), "isolated")
    pieces = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    train = _bpe(420, alphabet=pre_tokenizers.ByteLevel.alphabet(), ignore_merges=True)
    return _finished(train(pieces, decoder=decoders.Sequence([decoders.ByteLevel()])))


def _fallback(normalizer: Any, decoder: list[Any]) -> PreTrainedTokenizerFast:
    train = _bpe(700, ["<unk>", *BYTES], [*ASCII, "▁"], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    core = train(pre_tokenizers.Split("▁", "merged_with_next"), normalizer)
    data = json.loads(core.to_str())
    data["pre_tokenizer"] = None
    data["added_tokens"] = [one for one in data["added_tokens"] if one["content"] not in BYTES]
    core = Tokenizer.from_str(json.dumps(data))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *decoder])
    return _finished(core, unk_token="<unk>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama 2: a space is put in front of every stretch of text, and the first one is taken off again."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _fallback(normalizer, [decoders.Strip(" ", 1, 0)])


def byte_fallback_bare() -> PreTrainedTokenizerFast:
    """Gemma: no space in front."""
    return _fallback(normalizers.Replace(" ", "▁"), [])


def byte_fallback_first() -> PreTrainedTokenizerFast:
    """Mistral: a space in front of the first stretch only."""
    tokenizer = _fallback(None, [decoders.Strip(" ", 1, 0)])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    return tokenizer


def unigram() -> PreTrainedTokenizerFast:
    """XGLM, T5: the vocabulary lists control tokens as if they were text."""
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<unk>", *SPECIAL[:2]],
        unk_token="<unk>",
        initial_alphabet=ASCII,
        show_progress=False,
    )
    core.train_from_iterator([TEXT] * 3, trainer)
    core.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    return _finished(core, unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    """BERT; spaces are cleaned up."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]"], initial_alphabet=ASCII, show_progress=False
    )
    core.train_from_iterator([TEXT] * 3, trainer)
    core.decoder = decoders.WordPiece(cleanup=False)
    return _finished(core, unk_token="[UNK]", clean_up_tokenization_spaces=True)


def word_level() -> PreTrainedTokenizerFast:
    """Words between white space, and no decoder."""
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.train_from_iterator([TEXT], trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False))
    return _finished(core, unk_token="<unk>")


def word_ends() -> PreTrainedTokenizerFast:
    """CLIP: the last piece of a word carries a suffix, which is a space unless nothing follows."""
    train = _bpe(300, ["<unk>"], ASCII, unk_token="<unk>", end_of_word_suffix="</w>")
    return _finished(
        train(pre_tokenizers.WhitespaceSplit(), decoder=decoders.BPEDecoder(suffix="</w>"), suffix="</w>"),
        unk_token="<unk>",
    )


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    make.__name__: cache(make)
    for make in (
        byte_level,
        tiktoken_like,
        byte_fallback,
        byte_fallback_bare,
        byte_fallback_first,
        unigram,
        word_piece,
        word_level,
        word_ends,
    )
}
