"""A damaged, incomplete or foreign checkpoint is refused, the file or tensor named."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import POINTER, refusal
from safetensors.torch import load_file, save_file

from rrm_engine.backends.local import Solver
from rrm_engine.bench.table import about_solver
from rrm_engine.config import RunConfig
from rrm_engine.errors import RrmError
from rrm_engine.loading import checkpoint, hub
from rrm_engine.loading.load import load_pretrained
from rrm_engine.loading.prepare import load_model

SOURCE = Path(str(files("rrm_engine.data") / "embedded_model"))
CPU = torch.device("cpu")
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "someone/base", "r": 8}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded model."""
    return shutil.copytree(SOURCE, tmp_path / "model")


def change(folder: Path, name: str = "config.json", **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))


Tensors = dict[str, torch.Tensor]


def rewrite(folder: Path, edit: Callable[[Tensors], Tensors]) -> None:
    path = folder / "model.safetensors"
    save_file({name: t.contiguous() for name, t in edit(load_file(path)).items()}, path, metadata={"format": "pt"})


def shard(folder: Path, parts: int = 2) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{i % parts + 1:05}-of-{parts:05}.safetensors" for i, name in enumerate(tensors)}
    for part in set(places.values()):
        save_file({n: t for n, t in tensors.items() if places[n] == part}, folder / part, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(folder: Path, **options: Any) -> Path:
    path = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), path, **options)
    (folder / "model.safetensors").unlink()
    return path


def cut(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


# files


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"],
)
def test_every_file_may_be_an_lfs_pointer(folder: Path, name: str) -> None:
    (folder / name).write_text(POINTER)
    assert f"{name} is a Git LFS pointer, not the file itself: run `git lfs pull`" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not JSON"),
        (b'{"model_type": "qw', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"[]", "is not a JSON object"),
    ],
    ids=["empty", "cut", "deep", "bytes", "list"],
)
def test_every_json_file_is_an_object(folder: Path, name: str, content: bytes, reason: str) -> None:
    (folder / name).write_bytes(content)
    assert f"{name} {reason}" in refusal(folder)


@pytest.mark.parametrize("share", [0, 0.0000015, 0.0005, 0.5, 0.9999999, None])
def test_safetensors_that_are_cut_or_something_else(folder: Path, share: float | None) -> None:
    if share is None:
        (folder / "model.safetensors").write_bytes(b"<html>not found</html>" * 9)
    else:
        cut(folder / "model.safetensors", share)
    assert "model.safetensors is damaged or incomplete, download it again: " in refusal(folder)


def test_a_sharded_checkpoint(folder: Path) -> None:
    shard(folder)
    model, _ = load_pretrained(str(folder), "auto", CPU)
    whole, _ = load_pretrained(str(SOURCE), "auto", CPU)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))
    cut(folder / "model-00002-of-00002.safetensors")
    assert "model-00002-of-00002.safetensors is damaged" in refusal(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "names files that are not there: model-00002-of-00002.safetensors" in refusal(folder)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 5}}'])
def test_an_index_that_is_none(folder: Path, index: str) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json " in refusal(folder)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle"])
def test_weights_as_torch_saves_them(folder: Path, zipped: bool) -> None:
    path = pickled(folder, _use_new_zipfile_serialization=zipped)
    assert load_pretrained(str(folder), "auto", CPU)[0].model.embed_tokens.weight.shape[0] == 458
    for content, reason in [(b"", "it is empty"), (b"not at all", "it is no file of tensors")]:
        path.write_bytes(content)
        assert f"pytorch_model.bin is damaged or incomplete, download it again: {reason}" in refusal(folder)


def test_a_zip_that_is_cut(folder: Path) -> None:
    cut(pickled(folder))
    assert (
        "pytorch_model.bin is damaged or incomplete, download it again: it is a zip archive without its end"
        in refusal(folder)
    )


def test_a_pickle_that_would_run_code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": print}, folder / "pytorch_model.bin")
    assert "holds other objects than tensors" in refusal(folder)


def test_what_is_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "the directory has no weights (model.safetensors" in refusal(folder)
    assert "is a file, and not a GGUF file: name the directory" in refusal(folder / "config.json")
    (folder / "model.safetensors").symlink_to("model.safetensors")
    assert "model.safetensors is a link to something that is not there" in refusal(folder)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "is a link to something that is not there" in refusal(tmp_path / "loop")
    (tmp_path / "models").mkdir()
    (tmp_path / "models/x.gguf").touch()
    assert "to run its GGUF file, name that: x.gguf" in refusal(tmp_path / "models")
    (tmp_path / "models/x.gguf").rename(tmp_path / "models/x")
    assert "has no config.json, so it is not a saved model" in refusal(tmp_path / "models")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(folder: Path) -> None:
    (folder / "model.safetensors").chmod(0)
    assert "model.safetensors cannot be read: Permission denied" in refusal(folder)
    folder.chmod(0)
    assert "the directory cannot be read: you lack the permission" in refusal(folder)
    folder.chmod(0o700)


def test_adapters(folder: Path, tmp_path: Path) -> None:
    change(folder, "adapter_config.json", **ADAPTER)
    assert "merge it into them, or move adapter_config.json away" in refusal(folder)
    alone = tmp_path / "adapter"
    alone.mkdir()
    change(alone, "adapter_config.json", **ADAPTER)
    assert "it is an adapter of someone/base, not a model: merge it" in refusal(alone)


# configurations


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model_type": None}, "config.json names no model_type"),
        ({"model_type": "nonesuch"}, "transformers cannot use config.json: "),
        ({"model_type": "vit"}, "transformers has no causal language model of the vit family"),
        ({"model_type": "t5"}, "transformers has no causal language model of the t5 family"),
        ({"model_type": "qwen2_vl"}, "of the qwen2_vl family, nothing that continues text alone: use a text-only"),
        ({"model_type": "llava"}, "of the llava family"),
        ({"hidden_size": "wide"}, "config.json"),
        ({"hidden_act": "nonesuch"}, "transformers cannot build what config.json describes: KeyError('nonesuch')"),
        ({"vocab_size": -4}, "config.json"),
        ({"num_attention_heads": 0}, "config.json"),
    ],
    ids=lambda value: str(next(iter(value.items()))) if isinstance(value, dict) else "",
)
def test_configurations_of_no_model(folder: Path, values: dict[str, Any], reason: str) -> None:
    change(folder, **values)
    assert reason in refusal(folder)


CODE = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
OWN = """
from transformers import Qwen3Config, Qwen3ForCausalLM
class OwnConfig(Qwen3Config):
    model_type = "own_and_only"
class OwnModel(Qwen3ForCausalLM):
    config_class = OwnConfig
"""


def test_code_in_a_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Never run, nor asked about, unless that was asked for; where transformers knows the family, its own is used."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (folder / "own.py").write_text(OWN)
    change(folder, auto_map=CODE)
    assert type(load_pretrained(str(folder), "auto", CPU)[0]).__module__.startswith("transformers.models.qwen3")
    change(folder, model_type="own_and_only")
    assert "(own.OwnConfig): read it, and give --trust-remote-code if you trust it" in refusal(folder)
    model, _ = load_pretrained(str(folder), "auto", CPU, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "compressed-tensors", "nonesuch"])
def test_weights_that_cannot_be_unpacked(folder: Path, method: str) -> None:
    change(folder, quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": method == "bitsandbytes"})
    message = refusal(folder)
    assert f"its weights are quantised by {method}" in message and "pip" not in message


def in_blocks(weight: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``weight`` in fp8 with a scale for each square block; the scales; and what the two stand for."""
    grid = [-(-n // size) for n in weight.shape]
    padded = torch.zeros(grid[0] * size, grid[1] * size)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.reshape(grid[0], size, grid[1], size)
    scales = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-6) / 448
    packed = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    unpacked = packed.float() * scales[:, None, :, None]
    rows, columns = weight.shape
    cut = [part.reshape(padded.shape)[:rows, :columns] for part in (packed, unpacked)]
    return cut[0], scales, cut[1]


def to_fp8(folder: Path, size: int) -> Tensors:
    """Make the checkpoint one in fp8; returns what its weights stand for."""
    expected: Tensors = {}

    def pack(tensors: Tensors) -> Tensors:
        packed = {}
        for name, tensor in tensors.items():
            expected[name] = packed[name] = tensor
            if name.endswith("_proj.weight"):
                packed[name], packed[f"{name}_scale_inv"], expected[name] = in_blocks(tensor.float(), size)
        return packed

    rewrite(folder, pack)
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [size] * 2}
    change(folder, quantization_config=settings)
    return expected


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_fp8_weights_are_unpacked(folder: Path, dtype: str) -> None:
    expected = to_fp8(folder, 32)
    model, _ = load_pretrained(str(folder), dtype, CPU)
    loaded = model.state_dict()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16 if dtype == "auto" else torch.float32}
    for name, tensor in expected.items():
        assert torch.equal(loaded[name].bfloat16(), tensor.bfloat16()), name


def test_fp8_weights_that_cannot_be_unpacked(folder: Path) -> None:
    """Of 192 rows and blocks of 128 transformers would make two blocks of 96, without a word."""
    to_fp8(folder, 128)
    message = refusal(folder)
    assert "of 192x512 is no multiple of the fp8 blocks of 128x128" in message
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if not n.endswith("_scale_inv")})
    assert "is still torch.float8_e4m3fn after loading: the checkpoint lacks its scales" in refusal(folder)


# tensors


def test_tensors_that_are_not_there(folder: Path) -> None:
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if "layers.3" not in n})
    message = refusal(folder)
    assert "the checkpoint lacks model.layers.3.input_layernorm.weight, " in message and " and 8 more: " in message
    assert "it is incomplete, or its config is that of another model" in message


def test_a_head_that_is_not_there(folder: Path) -> None:
    change(folder, tie_word_embeddings=False)
    assert "the checkpoint lacks lm_head.weight" in refusal(folder)


def test_tied_weights_may_be_saved_under_either_name(folder: Path) -> None:
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    rewrite(folder, lambda tensors: {head if n == embedding else n: t for n, t in tensors.items()})
    model, _ = load_pretrained(str(folder), "auto", CPU)
    saved = load_file(SOURCE / "model.safetensors")[embedding]
    assert torch.equal(model.lm_head.weight.to(saved.dtype), saved)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tensors_that_belong_to_no_module(folder: Path) -> None:
    """A bias that the config knows nothing of would be left out without a word."""
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(4)}
    rewrite(folder, lambda tensors: tensors | bias)
    assert "has model.layers.0.self_attn.q_proj.bias, which Qwen3ForCausalLM does not" in refusal(folder)


def test_layers_that_the_config_does_not_count(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    layers = config["num_hidden_layers"] - 1
    change(folder, num_hidden_layers=layers)
    assert "config.json: Class validation error for validator 'validate_layer_type': " in refusal(folder)
    change(folder, num_hidden_layers=layers, layer_types=config["layer_types"][:layers])
    assert f"has model.layers.{layers}." in refusal(folder)


def test_modules_for_another_purpose_are_left_alone(folder: Path) -> None:
    spare = {
        "v_head.summary.weight": torch.ones(1, 4),
        "score.weight": torch.ones(1, 4),
        "mtp.norm.weight": torch.ones(4),
    }
    spare["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # older versions saved it
    rewrite(folder, lambda tensors: tensors | spare)
    model = load_model(str(folder))
    assert model.unused == ("mtp", "score", "v_head")  # and not what older versions saved
    assert load_model("embedded").unused == ()
    about = Solver(model, RunConfig(model=str(folder), prompt_style="embedded")).describe()
    assert about["unused"] == ["mtp", "score", "v_head"]
    assert about_solver(about)[1:] == ["not used of the checkpoint: mtp, score, v_head"]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_names_with_a_prefix(folder: Path, prefix: str) -> None:
    rewrite(folder, lambda tensors: {prefix + n: t for n, t in tensors.items()})
    assert f"the names of its tensors begin with {prefix}: " in refusal(folder)


def test_tensors_of_other_shapes(folder: Path) -> None:
    change(folder, intermediate_size=640)
    message = refusal(folder)
    assert "model.layers.0.mlp.down_proj.weight has the shape 192x512 where config.json makes it 192x640" in message
    assert ", and 11 more do not fit" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(folder: Path, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: tensors | {name: tensors[name].index_fill(0, torch.tensor([3]), value)})
    assert f"{name} holds values that are NaN or infinite: the checkpoint is damaged" in refusal(folder)


def test_weights_that_float16_cannot_hold(folder: Path) -> None:
    name = "model.norm.weight"
    rewrite(folder, lambda tensors: {n: t.float() * (1e6 if n == name else 1) for n, t in tensors.items()})
    load_pretrained(str(folder), "float32", CPU)
    assert f"{name} holds values" in (message := refusal(folder, "float16"))
    assert "or float16 cannot hold them: try --dtype bfloat16" in message


# tokenizers


def test_a_checkpoint_without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "the directory has no tokenizer (tokenizer.json): copy" in refusal(folder)


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model"])
def test_a_sentencepiece_tokenizer_without_its_package(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "find_spec", lambda _: None)
    (folder / "tokenizer.json").unlink()
    (folder / name).write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    assert f"its tokenizer is there as {name} alone, which" in (message := refusal(folder))
    assert message.endswith("pip install sentencepiece protobuf")
    (folder / name).write_bytes(b"IQ== 0\n")
    assert "sentencepiece protobuf" not in refusal(folder)  # this one is tiktoken's


@pytest.mark.slow
def test_a_tokenizer_without_an_end_or_padding(folder: Path) -> None:
    """Nothing is padded, and what the generation_config calls the end is one; without either there is no grammar."""
    ends = {"eos_token": None, "pad_token": None}
    change(folder, "tokenizer_config.json", **ends)
    config = RunConfig(model=str(folder), prompt_style="embedded", constrain="on")
    with closing(Solver.load(config)) as solver:
        assert solver.solve("(a) Zeno begins at 2 and repeats one step 3 times: add 8. Find the result.").answer
    for name in ("config.json", "generation_config.json"):
        change(folder, name, eos_token_id=None)
    with pytest.raises(RrmError, match=r"a grammar needs an end-of-sequence token, .* or give --constrain off"):
        Solver.load(config)
    with closing(Solver.load(replace(config, constrain="off", direct_max_tokens=5))) as solver:
        assert solver.solve("Find 1 + 1.", mode="direct").finish_reasons


@pytest.mark.parametrize("content", ["{}", '{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}'])
def test_a_tokenizer_that_is_none(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    assert "transformers cannot use its tokenizer: " in refusal(folder)


def test_a_tokenizer_that_is_larger_than_the_embedding(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SOURCE)
    tokenizer.add_tokens(["[PAD]"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    assert "tokens beyond the 458 rows of the model's embedding: '[PAD]' (458); use" in refusal(folder)


def test_a_tokenizer_config_may_be_missing(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    (folder / "generation_config.json").unlink()
    assert load_pretrained(str(folder), "auto", CPU)[1].is_fast


# the hub


def test_a_model_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert "./nowhere: there is no such directory or GGUF file" in refusal("./nowhere")
    assert "there is no such GGUF file" in refusal("nowhere/model.gguf")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(hub, "TIMEOUT_S", 1.0)
    assert "no local directory or GGUF file, and is not on this machine, and the hub cannot be" in refusal(
        "nobody/none"
    )
    assert capfd.readouterr().err == ""
    assert "is no hub id either: those are written owner/name" in refusal("C:\\model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "is not on this machine, and HF_HUB_OFFLINE keeps it from" in refusal("nobody/none")
