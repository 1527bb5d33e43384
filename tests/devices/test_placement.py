"""A model over several devices. They are virtual: one CPU named several times, or the meta device beside it."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch
from graph_scripts import GREEDY
from oracle import FAMILIES, engine_for, plain_model, prepared, prompt
from rrm_kernels.reference_layer import ReferenceLayer
from torch.fx.experimental import _config as fx_config
from torch.utils._python_dispatch import TorchDispatchMode

from rrm_engine.analyze.cli import main as analyze
from rrm_engine.backends.local import Solver
from rrm_engine.bench.cli import main
from rrm_engine.bench.tasks import load_tasks
from rrm_engine.config import RunConfig, WaitPolicy
from rrm_engine.engine.draw import draw
from rrm_engine.engine.engine import Engine
from rrm_engine.engine.replicas import SLACK, Replicas
from rrm_engine.engine.runner import ModelRunner
from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.scheduler import SchedulerOutput, Work
from rrm_engine.engine.sequence import Sequence
from rrm_engine.kv.cache import KVCache
from rrm_engine.kv.pool import BlockPool
from rrm_engine.kv.table import BlockTable
from rrm_engine.loading.load import load_skeleton
from rrm_engine.loading.placement import kv_bytes_per_token, parse_devices, plan_memory, split
from rrm_engine.loading.prepare import load_planned
from rrm_engine.models import lean
from rrm_engine.models.attention import ATTENTION_NAME, PagedForward, register_attention, transformers_forward
from rrm_engine.models.fuse import fuse
from rrm_engine.models.lean import LeanForward, Stage
from rrm_engine.models.spread import places, spread, tied_modules
from rrm_engine.solver.result import Job

CPU, OTHER, META = torch.device("cpu"), torch.device("cpu:1"), torch.device("meta")
POLICIES = get_args(WaitPolicy)


def replicas(model: Any, count: int = 2, together: bool = False, **changes: Any) -> Replicas:
    return Replicas([engine_for(model, **changes) for _ in range(count)], together)


# where tensors are


class Copies(TorchDispatchMode):
    """Counts copies from device to device, and lets no other operation have tensors of two devices."""

    def __init__(self) -> None:
        super().__init__()
        self.crossed = Counter[tuple[int, ...]]()
        self.mixed: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        devices = {t.device for t in given if t.dim()}
        if isinstance(found, torch.Tensor) and devices and found.device not in devices:
            self.crossed[tuple(given[0].shape)] += 1
        elif len(devices) > 1:
            self.mixed.append(str(func))
        return found


def lean_over(model: Any, devices: list[torch.device]) -> LeanForward:
    """The lean forward over two devices, with kernels of plain torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "allclose", lambda *_, **__: True)  # tensors on the meta device have no values
        patch.setattr("rrm_engine.models.fuse._distance", lambda *_: 0.0)
        fuse(model)
    stages = [Stage(device, cast(Any, ReferenceLayer())) for device in (CPU, META)]
    for i, device in enumerate(devices):
        layer = lean._layer(i, model.model.layers[i], model, device)
        assert layer is not None
        stages[device == META].layers.append(layer)
    return LeanForward(model, stages)


@contextmanager
def stepped(family: str, layers: int, is_lean: bool = False) -> Iterator[tuple[torch.Tensor, KVCache, Copies]]:
    """A chunk and a decode through a model whose last ``layers`` layers and head are on the meta device."""
    register_attention()
    model = plain_model(family, num_hidden_layers=1 + layers)
    model.set_attn_implementation(ATTENTION_NAME)
    devices = [CPU, *[META] * layers]
    spread(model, devices)
    forward = lean_over(model, devices) if is_lean else transformers_forward(model, META)
    runner = ModelRunner(forward, KVCache(20, 4), CPU)
    work, pool = [], BlockPool(20, 4)
    for i, (length, start) in enumerate(((9, 0), (6, 5))):
        sampling = SamplingParams(0.7, 5 * i, 0.9)
        sequence = Sequence(f"s{i}", prompt(i, length), BlockTable(pool), sampling, i, 3)
        sequence.table.append(length)
        work.append(Work(sequence, start, length - start, samples=True))
    no_padding = {"meta_nonzero_assume_all_nonzero": True}  # the reference kernels look for some
    patched = fx_config.patch(no_padding)  # type: ignore[attr-defined]  # torch adds it
    with torch.inference_mode(), patched, Copies() as copies:
        logits, order = runner.run(SchedulerOutput(tuple(work), ()))
        sequences, lengths = [w.sequence for w in order], [len(w.sequence.tokens) for w in order]
        drawn = draw(logits, sequences, lengths)  # would raise if it waited for a value
    assert logits.device == drawn.device == META
    yield drawn, runner.cache, copies


TRANSFORMERS = ["cohere2", "gemma2", "gemma3_text", "granite", "llama", "olmo2", "opt", "qwen3"]
LEAN = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.mark.parametrize(("family", "is_lean"), [*((f, False) for f in TRANSFORMERS), *((f, True) for f in LEAN)])
def test_every_stage_has_its_tensors_on_its_device_and_gets_them_once(family: str, is_lean: bool) -> None:
    with stepped(family, 2, is_lean) as (_, cache, copies):  # layers of every kind that a family has
        assert [cache.shapes[i].device for i in range(3)] == [CPU, META, META]
        assert copies.mixed == []
    with stepped(family, 4, is_lean) as (_, _, more):
        assert more.mixed == []
    assert more.crossed == copies.crossed, "what several layers need was brought once for each"
    assert 5 <= copies.crossed.total() <= 17  # where there are two rotations, else 15


def test_what_is_left_on_the_first_device_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PagedForward, "batch_on", lambda self, device: self.batch)
    with pytest.raises(RuntimeError, match=r"same device|not on the expected device"), stepped("llama", 1):
        pass


def test_what_is_brought_for_every_layer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    bring = PagedForward.bring
    monkeypatch.setattr(PagedForward, "bring", lambda self, *of: bring(replace(self, brought={}), *of))
    with stepped("llama", 1) as (_, _, few), stepped("llama", 4) as (_, _, many):
        assert many.crossed != few.crossed


@pytest.mark.parametrize("tie", [True, False])
def test_a_tied_weight_is_copied_where_its_ends_are_apart(tie: bool) -> None:
    apart, beside = (plain_model("llama", tie_word_embeddings=tie) for _ in range(2))
    assert bool(tied_modules(apart)) is tie
    spread(apart, [CPU, META])
    spread(beside, [CPU, CPU])
    assert (apart.model.embed_tokens.weight.device, apart.lm_head.weight.device) == (CPU, META)
    assert bool(tied_modules(beside)) is tie


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_weight_has_one_place(family: str) -> None:
    model = plain_model(family)
    found = places(model, [CPU, META])
    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        owners = [place for place in found if name.startswith(f"{place}.")]
        assert len(owners) == 1, name


# the plan


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_kv_a_plan_counts_on_is_what_the_model_stores(family: str) -> None:
    own_heads = {"num_key_value_heads": 4} if family in ("gpt2", "gpt_neox", "opt") else {}  # they know no others
    plain = plain_model(family, **own_heads)
    stored = {shape.bytes_per_token for shape in prepared(plain).shapes.values()}
    assert stored == {kv_bytes_per_token(plain.config, torch.float32)}


def test_layers_are_split_by_what_is_left_for_kv() -> None:
    assert split([10] * 8, 1, 0, 0, [1000.0, 1000.0]) == (4, 8)
    assert split([10] * 8, 1, 400, 0, [1000.0, 1000.0]) == (3, 8)  # an embedding before them
    assert split([10] * 8, 1, 0, 400, [1000.0, 1000.0]) == (5, 8)
    assert split([10] * 8, 1, 0, 0, [1000.0, 3000.0]) == (2, 8)
    assert split([10] * 3, 1, 0, 900, [1000.0] * 3) == (1, 2, 3)


def test_auto_takes_one_device_only_if_the_model_fits_there(monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = load_skeleton("embedded", "auto")
    assert all(p.device == META for p in skeleton.parameters())
    two = [CPU, META]  # two devices that are not the same
    for free, kind in ((1 << 40, "single"), (40 << 20, "pipeline")):
        monkeypatch.setattr("rrm_engine.device.memory.free_memory", lambda device, free=free: free)
        monkeypatch.setattr("rrm_engine.loading.placement.free_memory", lambda device, free=free: free)
        plan = plan_memory(skeleton, two, "auto")
        assert (plan.kind, len(plan.stages)) == (kind, 1 if kind == "single" else 2)
        assert plan_memory(skeleton, [CPU, CPU], "auto", useful=1).kind == "single"
    weights = sum(p.numel() * p.element_size() for p in skeleton.parameters())
    tied = sum(m.get_parameter("weight").numel() * 4 for m in tied_modules(skeleton).values())
    assert sum(stage.weights for stage in plan.stages) == weights + tied
    both = plan_memory(skeleton, [CPU, CPU], "replicate")
    assert both.room == plan_memory(skeleton, [CPU], "single").room // 2
    monkeypatch.setattr("rrm_engine.device.memory.free_memory", lambda device: 1 << 20)
    with pytest.raises(ValueError, match=r"the model does not fit, memory plan, replicate.*--devices"):
        plan_memory(skeleton, [CPU, CPU], "replicate")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"device": "cpu", "devices": "cpu,cpu"}, "--device and --devices both"),
        ({"placement": "pipeline"}, "--placement pipeline needs --devices"),
        ({"placement": "replicate"}, "--placement replicate needs --devices"),
        ({"placement": "both", "devices": "cpu"}, "--placement takes auto, single, pipeline, replicate"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        RunConfig(**settings)


def test_devices_that_cannot_be_used_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="--devices cuda:77 cannot be used"):
        parse_devices("cpu,cuda:77")
    with pytest.raises(ValueError, match="--devices names 9 stages and the model has 4 layers"):
        plan_memory(load_skeleton("embedded", "auto"), [CPU] * 9, "pipeline")


# replicas


def test_weights_of_replicas_on_one_device_are_there_once() -> None:
    plan = plan_memory(load_skeleton("embedded", "auto"), parse_devices("cpu,cpu,cpu"), "replicate")
    models = load_planned("embedded", "auto", plan)
    assert len(models) == 3 and len({id(m.model) for m in models}) == 1


def home(engine: Replicas, sequence: Sequence) -> Engine:
    """The replica that runs a sequence."""
    return next(replica for replica in engine.engines if sequence in replica.sequences)


def test_roots_spread_forks_stay_and_children_go_home_while_there_is_room() -> None:
    engine = replicas(prepared(plain_model("qwen3")))
    first, second = (engine.submit(f"r{i}", prompt(i, 20), 30, GREEDY, root=i) for i in range(2))
    assert home(engine, first) is not home(engine, second)
    for _ in range(8):
        engine.step()
    where = [
        home(engine, engine.submit(f"r0.{i}", prompt(0, 12) + prompt(i, 3), 30, GREEDY, depth=1)) for i in range(SLACK)
    ]
    assert set(where) == {home(engine, first)}
    for i in range(2):  # the second while its replica is clearly more loaded
        fork = engine.submit(f"r0.f{i}", [*first.tokens, i], 30, GREEDY, depth=1, fork_of=(first, len(first.tokens)))
        assert fork in home(engine, first).sequences and fork not in home(engine, second).sequences
    crowded = engine.submit("r0.x", prompt(0, 12), 30, GREEDY, depth=1)
    assert home(engine, crowded) is home(engine, second)
    engine.together = True
    bound = engine.submit("r0.y", prompt(0, 12), 30, GREEDY, depth=1)
    assert home(engine, bound) is home(engine, first)
    with pytest.raises(ValueError, match="another replica"):
        home(engine, first).keep(first, second, 0, 4)


def test_replicas_launch_before_they_collect() -> None:
    engine = replicas(prepared(plain_model("qwen3")))
    order: list[str] = []
    for name, one in zip("ab", engine.engines, strict=True):
        launch, collect = one.launch, one.collect
        one.launch = lambda name=name, launch=launch: order.append(f"launch {name}") or launch()  # type: ignore
        one.collect = lambda name=name, collect=collect: order.append(f"collect {name}") or collect()  # type: ignore
        engine.submit(name, prompt(1, 5), 3, GREEDY, root=ord(name))
    engine.step()
    assert order == ["launch a", "launch b", "collect a", "collect b"]


# whole tasks


def solved(count: int = 4, **settings: Any) -> dict[str, tuple[Any, ...]]:
    tasks = load_tasks("embedded").tasks[:count]
    solver = Solver.load(RunConfig(temperature=0.0, **settings), [t.problem for t in tasks])
    jobs = [Job(t.id, t.problem) for t in tasks]
    found = {r.job.id: (r.status, r.answer, r.finish_reasons, r.total_tokens) for r in solver.run(jobs, concurrency=2)}
    solver.close()
    return found


@pytest.fixture(scope="module")
def single() -> dict[str, tuple[Any, ...]]:
    return solved()


@pytest.mark.parametrize(
    "settings",
    [
        {"devices": "cpu,cpu,cpu", "placement": "pipeline"},
        {"devices": "cpu,cpu", "placement": "replicate"},
        {
            "devices": "cpu,cpu",
            "placement": "pipeline",
            "kv_blocks": 80,
            "max_sequence_tokens": 900,
            "max_concurrency": 3,
        },
        {"devices": "cpu,cpu", "placement": "pipeline", "wait_policy": "auto"},
        {"devices": "cpu,cpu"},
    ],
)
def test_answers_do_not_depend_on_the_placement(settings: dict[str, Any], single: dict[str, tuple[Any, ...]]) -> None:
    assert solved(**settings) == single


@pytest.mark.parametrize("placement", ["pipeline", "replicate"])
def test_splices_and_forks_on_several_devices(placement: str) -> None:
    options: dict[str, Any] = {"join": "splice", "child_context": "parent", "count": 1, "splice_report": 4}
    assert solved(devices="cpu,cpu", placement=placement, **options) == solved(**options)


def test_a_run_of_the_bench_on_two_devices(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = []
    both = ["--devices", "cpu,cpu", "--placement"]
    for name, flags in (("one", []), ("two", [*both, "pipeline"]), ("copies", [*both, "replicate"])):
        arguments = ["--limit", "1", "--modes", "rrm", "--temperature", "0", "--out", str(tmp_path / name)]
        assert main([*arguments, *flags]) == 0
        rows.append(json.loads((tmp_path / name / "rows.jsonl").read_text()))
    shown = capfd.readouterr().err
    assert "memory plan, pipeline: cpu: layers 0 to" in shown
    assert shown.index("memory plan") < shown.index("cpu,cpu (pipeline)")
    same = ("answer", "status", "total_tokens", "critical_path_tokens", "finish_reasons")
    assert [rows[0][k] for k in same] == [rows[1][k] for k in same] == [rows[2][k] for k in same]
    assert rows[0]["servers"] == rows[1]["servers"] == {}
    assert rows[2]["servers"]["replicas"].keys() == rows[2]["finish_reasons"].keys()  # every node has one
    assert analyze([str(tmp_path / "copies")]) == 0
    assert "Nodes by replica: cpu #0 " in " ".join(capfd.readouterr().out.split())
    resolved = json.loads((tmp_path / "two" / "run.json").read_text())["resolved"]
    assert (resolved["devices"], resolved["placement"]) == ("cpu,cpu", "pipeline")
