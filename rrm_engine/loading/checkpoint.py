"""A checkpoint's files before anything is loaded: where they are, and whether they are whole.

What is missing, cut off or not a checkpoint at all is refused here, with the file's name. So what is left to go wrong
in transformers is known: a configuration, a tokenizer or tensors that do not fit.
"""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rrm_engine.errors import RrmError
from rrm_engine.loading.geometry import find_geometry
from rrm_engine.loading.gguf_header import MAGIC, Damaged, GgufHeader, read_header
from rrm_engine.loading.hub import download

EMBEDDED = "embedded"
LFS_POINTER = b"version https://git-lfs"
CONFIG, ADAPTER = "config.json", "adapter_config.json"
# In the order in which transformers looks for them.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER = "tokenizer.json"
# Any of these holds a vocabulary; the tokenizer's class knows which.
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
OTHER_VOCABULARIES = ("vocab.json", "vocab.txt", "tekken.json")
READ_BY_TRANSFORMERS = (
    *("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *(TOKENIZER, "vocab.json"),
)
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")  # all but the weights, on the hub


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """``name`` as the user gave it; ``folder`` holds its files, ``gguf`` being the name of the one to read, if any."""

    name: str
    folder: Path
    gguf: str | None = None

    def refusal(self, text: str) -> RrmError:
        """The error to raise; ``text`` goes on after the name, as in "x.json is empty"."""
        return RrmError(f"--model {self.name}: {text}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors in its safetensors files, by name."""
        from safetensors import safe_open

        found: dict[str, tuple[int, ...]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            with safe_open(path, framework="np") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return found


def refuse_damaged(name: str) -> None:
    """Refuse a model that cannot be loaded for what its files are. Takes no second once they are on this machine."""
    if find_geometry(name) is None:
        inspect(find(name))


def find(name: str) -> Checkpoint:
    """``embedded``, a directory, a GGUF file or a hub id, whose files are downloaded. Raises RrmError."""
    if name == EMBEDDED:
        return Checkpoint(name, Path(str(files("rrm_engine.data") / "embedded_model")))
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path) and name:
        return Checkpoint(name, path)
    if os.path.isfile(path):
        if path.suffix.lower() == ".gguf" or _starts_with(path, MAGIC):
            return Checkpoint(name, path.parent, path.name)
        raise RrmError(f"--model {name} is a file, and not a GGUF file: name the directory that it lies in")
    if os.path.lexists(path):
        raise RrmError(f"--model {name} is a link to something that is not there")
    if path.suffix.lower() == ".gguf":
        raise RrmError(f"--model {name}: there is no such GGUF file")
    if not name or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise RrmError(f"--model {name}: there is no such directory or GGUF file")
    return Checkpoint(name, _download(name))


def inspect(checkpoint: Checkpoint) -> None:
    """Read all small files, and the headers of the large ones. Raises RrmError at the first that is not whole."""
    if not os.access(checkpoint.folder, os.R_OK | os.X_OK):
        raise checkpoint.refusal("the directory cannot be read: you lack the permission")
    if checkpoint.gguf is not None:
        _inspect_gguf(checkpoint)
        return
    config = _config(checkpoint)
    if (checkpoint.folder / ADAPTER).exists():
        raise checkpoint.refusal(
            f"{ADAPTER} says that the directory holds an adapter, and there are weights beside it: merge it into them, "
            f"or move {ADAPTER} away to run them without it"
        )
    for path in sorted(checkpoint.folder.glob("*.json")):
        if path.name in READ_BY_TRANSFORMERS:
            _read_json(checkpoint, path.name)
    for path in sorted(checkpoint.folder.glob("*.jinja")):
        _read_text(checkpoint, path.name)
    _inspect_tokenizer(checkpoint)
    if "transformers_weights" not in config:  # else they have names of their own
        _inspect_weights(checkpoint)


@cache
def _download(name: str) -> Path:
    """One snapshot in the life of the process: all that reads the model reads the same files."""
    try:
        folder = download(name, [*SMALL_FILES, "model*.safetensors"])
        return (
            folder if any(folder.glob("model*.safetensors")) else download(name, [*SMALL_FILES, "pytorch_model*.bin"])
        )
    except RrmError as error:
        raise RrmError(
            f"--model {name} is no local directory or GGUF file, and {error}; without --model the embedded model runs"
        ) from error


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    folder = checkpoint.folder
    if (folder / CONFIG).exists():
        config = _read_json(checkpoint, CONFIG)
        if not config.get("model_type") and "auto_map" not in config:
            raise checkpoint.refusal(f"{CONFIG} names no model_type: it is not the config of a transformers model")
        return config
    if (folder / ADAPTER).exists():
        base = _read_json(checkpoint, ADAPTER).get("base_model_name_or_path")
        raise checkpoint.refusal(
            f"it is an adapter of {base}, not a model: merge it into that model (PEFT: merge_and_unload) and name the "
            f"result's directory"
        )
    if found := sorted(path.name for path in folder.glob("*.gguf")):
        raise checkpoint.refusal(f"the directory has no {CONFIG}; to run its GGUF file, name that: {found[0]}")
    raise checkpoint.refusal(f"the directory has no {CONFIG}, so it is not a saved model")


def _inspect_tokenizer(checkpoint: Checkpoint) -> None:
    names = {path.name for path in checkpoint.folder.iterdir()}
    custom = any(name.endswith((".tiktoken", ".py")) for name in names)
    if not custom and not names & {TOKENIZER, *SENTENCEPIECE, *OTHER_VOCABULARIES}:
        raise checkpoint.refusal(
            f"the directory has no tokenizer ({TOKENIZER}): copy the tokenizer's files of the model that it was made of"
        )
    if not custom and not names & {TOKENIZER, *OTHER_VOCABULARIES} and find_spec("sentencepiece") is None:
        name = min(names & set(SENTENCEPIECE))
        if _starts_with(checkpoint.folder / name, b"\n"):  # else it is one of tiktoken
            raise checkpoint.refusal(
                f"its tokenizer is there as {name} alone, which transformers reads with one more package: "
                f"pip install sentencepiece protobuf"
            )


def _inspect_weights(checkpoint: Checkpoint) -> None:
    names = {path.name for path in checkpoint.folder.iterdir()}
    first = next((name for name in WEIGHTS if name in names), None)
    if first is None:
        raise checkpoint.refusal(f"the directory has no weights ({WEIGHTS[0]}, {WEIGHTS[1]} or {WEIGHTS[2]})")
    if not (checkpoint.folder / first).exists():
        raise checkpoint.refusal(f"{first} is a link to something that is not there")
    parts = _parts(checkpoint, first) if first.endswith(".json") else [first]
    if absent := [part for part in parts if not (checkpoint.folder / part).exists()]:
        raise checkpoint.refusal(f"{first} names files that are not there: {shortened(absent)}; download them again")
    for part in parts:
        _inspect_tensors(checkpoint, part)


def _parts(checkpoint: Checkpoint, index: str) -> list[str]:
    places = _read_json(checkpoint, index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(part, str) for part in places.values()):
        raise checkpoint.refusal(f"{index} has no weight_map from tensors to files: download it again")
    return sorted(set(places.values()))


def _inspect_tensors(checkpoint: Checkpoint, name: str) -> None:
    """A file of tensors has a header that fits its length; what the tensors hold is seen when they are loaded."""
    from safetensors import SafetensorError, safe_open

    path = checkpoint.folder / name
    _refuse_pointer(checkpoint, name)
    try:
        if path.stat().st_size == 0:
            raise Damaged("it is empty")
        if name.endswith(".safetensors"):
            with safe_open(path, framework="np"):
                pass
        elif not zipfile.is_zipfile(path):
            _inspect_pickle(path)
    except SafetensorError as error:
        raise checkpoint.refusal(f"{name} is damaged or incomplete, download it again: {error}") from error
    except Damaged as error:
        raise checkpoint.refusal(f"{name} is damaged or incomplete, download it again: {error}") from error
    except OSError as error:
        raise _unreadable(checkpoint, name, error) from error


def _inspect_pickle(path: Path) -> None:
    """Before version 1.6 torch wrote tensors so. Raises Damaged."""
    if _starts_with(path, b"PK"):
        raise Damaged("it is a zip archive without its end")
    if not _starts_with(path, pickle.PROTO):
        raise Damaged("it is no file of tensors")


def _inspect_gguf(checkpoint: Checkpoint) -> None:
    assert checkpoint.gguf is not None
    _refuse_pointer(checkpoint, checkpoint.gguf)
    try:
        header = read_header(checkpoint.folder / checkpoint.gguf)
    except ImportError as error:
        raise checkpoint.refusal("reading GGUF needs one more package: pip install 'rrm-engine[gguf]'") from error
    except Damaged as error:
        raise checkpoint.refusal(f"the GGUF file is damaged or incomplete, download it again: {error}") from error
    except OSError as error:
        raise _unreadable(checkpoint, "the GGUF file", error) from error
    if missing := _missing_metadata(header):
        raise checkpoint.refusal(f"the GGUF file lacks {missing}: it is not one of a language model, or was cut down")
    _refuse_more_blocks(checkpoint, header)
    if header.metadata.get("split.count", 1) > 1:
        raise checkpoint.refusal(
            f"the GGUF file is one of {header.metadata['split.count']} parts: join them with llama-gguf-split --merge"
        )


def _refuse_more_blocks(checkpoint: Checkpoint, header: GgufHeader) -> None:
    """transformers reads as many layers as the header counts, and leaves others alone without a word."""
    counted = header.metadata.get(f"{header.metadata['general.architecture']}.block_count")
    found = {int(name.split(".")[1]) for name in header.tensors if re.match(r"blk\.\d+\.", name)}
    if counted is not None and found and max(found) >= counted:
        raise checkpoint.refusal(
            f"the GGUF file has tensors of {max(found) + 1} layers where its header counts {counted}: it was edited "
            f"or badly converted"
        )


def _missing_metadata(header: GgufHeader) -> str | None:
    """What a GGUF file of a language model must have besides its tensors."""
    metadata, kind = header.metadata, header.metadata.get("tokenizer.ggml.model")
    wanted = ["general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.tokens"]
    wanted += {"llama": ["tokenizer.ggml.scores"], "gpt2": ["tokenizer.ggml.merges"]}.get(str(kind), [])
    return next((key for key in wanted if key not in metadata), None)


def _read_json(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    text = _read_text(checkpoint, name)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise checkpoint.refusal(f"{name} is not JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise checkpoint.refusal(f"{name} is not a JSON object: download it again")
    return value


def _read_text(checkpoint: Checkpoint, name: str) -> str:
    _refuse_pointer(checkpoint, name)
    try:
        return (checkpoint.folder / name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise checkpoint.refusal(f"{name} is not UTF-8 text: download it again") from error
    except OSError as error:
        raise _unreadable(checkpoint, name, error) from error


def _refuse_pointer(checkpoint: Checkpoint, name: str) -> None:
    try:
        if _starts_with(checkpoint.folder / name, LFS_POINTER):
            raise checkpoint.refusal(f"{name} is a Git LFS pointer, not the file itself: run `git lfs pull` there")
    except OSError as error:
        raise _unreadable(checkpoint, name, error) from error


def _unreadable(checkpoint: Checkpoint, name: str, error: OSError) -> RrmError:
    return checkpoint.refusal(f"{name} cannot be read: {error.strerror or error}")


def _starts_with(path: Path, start: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(start)) == start


def shortened(names: Iterable[str], most: int = 3) -> str:
    """A few of them, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
