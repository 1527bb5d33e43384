"""A GGUF file that is damaged, incomplete or not what its header says is refused, and says which."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import POINTER, refusal

from rrm_engine.loading.prepare import load_model


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(metadata: dict[str, Any], tensors: dict[str, int]) -> bytes:
    """A GGUF file with the given texts and numbers, and tensors of fp32."""
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        head += text(key)
        if isinstance(value, str):
            head += struct.pack("<I", 8) + text(value)
        elif isinstance(value, list):
            head += struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        else:
            head += struct.pack("<II", 4, value)
    offset = 0
    for name, size in tensors.items():
        head += text(name) + struct.pack("<IQIQ", 1, size, 0, offset)
        offset += -(-4 * size // 32) * 32
    return head + bytes(-len(head) % 32 + offset)


WHOLE = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"]}
WHOLE |= {"tokenizer.ggml.merges": ["a b"]}
CUTS = (0, 3, 20, 30, 60, 100, 170, -1)  # bytes of a file


@pytest.mark.parametrize("content", [*(gguf(WHOLE, {"a": 32, "b": 64})[:n] for n in CUTS), b"not at all"])
def test_a_gguf_file_that_is_cut_or_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    assert "the GGUF file is damaged or incomplete, download it again: " in refusal(tmp_path / "x.gguf")


@pytest.mark.parametrize("key", WHOLE)
def test_a_gguf_file_without_what_it_needs(tmp_path: Path, key: str) -> None:
    (tmp_path / "x.gguf").write_bytes(gguf({k: v for k, v in WHOLE.items() if k != key}, {"a": 32}))
    assert f"the GGUF file lacks {key}: " in refusal(tmp_path / "x.gguf")


def test_other_gguf_files(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf({**WHOLE, "general.architecture": "nonesuch"}, {"a": 32}))
    assert "transformers cannot use the GGUF file: " in refusal(path)
    path.write_bytes(gguf({**WHOLE, "split.count": 3}, {"a": 32}))
    assert "the GGUF file is one of 3 parts: join them" in refusal(path)
    path.write_text(POINTER)
    assert "x.gguf is a Git LFS pointer" in refusal(path)
    path.unlink()
    path.mkdir()
    assert "the directory has no config.json" in refusal(path)


def tiny_gguf(path: Path, blocks: int = 2, without: str = "") -> Path:
    """A random Llama of two layers whose header counts ``blocks``, one tensor left out."""
    from gguf import GGUFWriter
    from tokenizers import pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<|endoftext|>"]
    width, inner = 32, 48
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(blocks)
    writer.add_context_length(256)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(len(tokens) - 1)
    shapes = {"token_embd": (len(tokens), width), "output": (len(tokens), width), "output_norm": (width,)}
    for i in range(2):
        shapes |= {f"blk.{i}.{part}_norm": (width,) for part in ("attn", "ffn")}
        shapes |= {f"blk.{i}.attn_{part}": (width, width) for part in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_{part}": (inner, width) for part in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down": (width, inner)}
    generator = np.random.default_rng(0)
    for name in (name for name in shapes if name != without):
        writer.add_tensor(f"{name}.weight", generator.standard_normal(shapes[name], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_with_all_its_tensors(tmp_path: Path) -> None:
    assert len(load_model(str(tiny_gguf(tmp_path / "x.gguf")), "float32", "cpu").shapes) == 2


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"without": "blk.1.ffn_up"}, "the checkpoint lacks model.layers.1.mlp.up_proj.weight: it is incomplete"),
        ({"without": "output_norm"}, "the checkpoint lacks model.norm.weight: it is incomplete"),
        ({"without": "token_embd"}, "the checkpoint lacks model.embed_tokens.weight: it is incomplete"),
        ({"blocks": 3}, "the checkpoint lacks model.layers.2."),
        ({"blocks": 1}, "has tensors of 2 layers where its header counts 1: "),
    ],
    ids=str,
)
def test_a_gguf_file_whose_tensors_are_not_those_of_its_header(
    tmp_path: Path, changed: dict[str, Any], reason: str
) -> None:
    assert reason in refusal(tiny_gguf(tmp_path / "x.gguf", **changed))
