"""The path of a step on CUDA, on whatever device there is: static buffers, padding, CUDA graphs, the lean forward.

Without a GPU the same code runs under Triton's interpreter, a replay being a call on the static buffers.
"""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graph_scripts import mistakes, short_graph
from lab import engine_of
from matrix import static_model
from oracle import engine_for, plain_model, prompt

pytest.importorskip("triton", reason="triton is not installed: pip install triton (Linux)")
from rrm_kernels import buffers
from rrm_kernels.sharing import SharingCost
from rrm_kernels.staging import Staging
from rrm_kernels.tile import INTERPRETED
from rrm_kernels.triton_layer import TritonLayer

from rrm_engine.backends.local import Solver
from rrm_engine.config import RunConfig
from rrm_engine.engine import static_steps
from rrm_engine.engine.cuda_graphs import CudaGraphs
from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.static_steps import StaticSteps
from rrm_engine.kv.pool import NULL_BLOCK
from rrm_engine.loading.prepare import LoadedModel, prepare_model
from rrm_engine.models.lean import LeanForward

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
ON_CUDA = DEVICE.type == "cuda"
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
ALWAYS = SharingCost(member=0, crossover=0)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # padding rows hold anything
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="TRITON_INTERPRET=0 and no GPU"),
]


def loaded(plain: Any) -> LoadedModel:
    tokenizer: Any = SimpleNamespace(eos_token_id=1)
    return prepare_model(copy.deepcopy(plain), tokenizer, plain.config.model_type, DEVICE, "triton")


@pytest.fixture(scope="module")
def on_torch() -> tuple[Any, LoadedModel]:
    """A model and the same one ready, on CUDA with its kernels; without it with their torch references."""
    plain = plain_model("qwen3")
    return plain, static_model(plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lean_forward_on_triton_equals_plain_transformers(family: str) -> None:
    model = loaded(plain_model(family, num_hidden_layers=1))
    assert isinstance(model.forward, LeanForward)
    assert isinstance(model.forward.stages[0].kernels, TritonLayer)
    assert model.load_check_error < 1e-4


def test_padded_steps_on_triton_equal_plain_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed steps and decodes, with a prefix that two children share."""
    plain = plain_model("qwen3", num_hidden_layers=1)
    model = loaded(plain)
    monkeypatch.setattr(model.attend, "sharing", ALWAYS)
    engine = engine_for(model, lookahead=True)
    keys = watch(engine.runner.static, monkeypatch)
    assert mistakes(plain, short_graph(engine)) == {}
    assert {key.queries == 1 for key in keys} == {True, False}
    assert any(key.pieces for key in keys)


@pytest.mark.parametrize("eager", [True, False])
def test_decodes_and_mixed_steps_are_padded_unless_eager(
    on_torch: tuple[Any, LoadedModel], eager: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_for(on_torch[1], lookahead=True, eager=eager)
    keys = watch(engine.runner.static, monkeypatch)
    short_graph(engine)
    assert all((key is None) == eager for key in keys)
    assert eager or {key.queries == 1 for key in keys} == {True, False}


def watch(steps: StaticSteps, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The keys of all steps from now on."""
    keys: list[Any] = []
    run = steps.run

    def noting(step: Any) -> torch.Tensor:
        keys.append(step.key)
        return run(step)

    monkeypatch.setattr(steps, "run", noting)
    return keys


class Pair:
    """The same sequences in two engines on the same model, one with padded steps and one with eager ones."""

    def __init__(self, model: LoadedModel) -> None:
        self.engines = [engine_for(model, blocks=60, eager=eager) for eager in (False, True)]
        self.padded = self.engines[0].runner.static
        self.logits: list[torch.Tensor] = []
        self.steps = 0

    def submit(self, count: int, length: int, budget: int) -> None:
        for i in range(count):
            key = f"s{len(self.engines[0].sequences)}"
            for engine in self.engines:
                engine.submit(key, prompt(10 * length + i, length + i), budget, SamplingParams(), root=i)

    def run(self) -> float:
        """Run to the end; the largest difference of logits and, at live slots and the null block, of KV."""
        worst = 0.0
        while any(engine.has_work for engine in self.engines):
            for engine in self.engines:
                for sequence in engine.sequences:
                    sequence.probe.keep_logits = True
                engine.step()
            for one, other in zip(*(engine.sequences for engine in self.engines), strict=True):
                if one.probe.logits is not None and other.probe.logits is not None:
                    worst = max(
                        worst, float((one.probe.logits - other.probe.logits).abs().nan_to_num(float("inf")).max())
                    )
                other.tokens[:] = one.tokens  # a difference shows, and does not spread
        return max(worst, *(self._kv_difference(i) for i in self.engines[0].runner.cache.shapes))

    def _kv_difference(self, layer: int) -> float:
        caches = [engine.runner.cache for engine in self.engines]
        pools = zip(*(cache.pools(layer, cache.shapes[layer]) for cache in caches), strict=True)
        return max(float((a - b).abs().nan_to_num(float("inf")).max()) for a, b in pools)


CLOSE = 1e-3 if ON_CUDA else 1e-4  # sums are done in another order where a step has other numbers of rows


def test_padding_and_stale_buffers_change_nothing(on_torch: tuple[Any, LoadedModel]) -> None:
    """Large steps, then small ones in the same buffers, then large ones again: as eager, to the last KV line."""
    pair = Pair(on_torch[1])
    for count, length in ((7, 9), (1, 3), (3, 14), (5, 2)):
        pair.submit(count, length, 3)
        assert pair.run() < CLOSE
        for engine in pair.engines:
            for sequence in list(engine.sequences):
                engine.finish(sequence)
    cache = pair.engines[0].runner.cache
    for layer, shape in cache.shapes.items():
        assert not any(pool[NULL_BLOCK].any() for pool in cache.pools(layer, shape))


def test_padding_that_writes_to_a_real_block_is_noticed(
    on_torch: tuple[Any, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control."""
    pair = Pair(on_torch[1])
    monkeypatch.setattr(buffers, "PADDING_SLOT", pair.engines[0].pool.block_size)  # the first real block
    pair.submit(3, 9, 3)
    assert pair.run() > 0.01


@pytest.mark.parametrize("stale", ["query_start", "context_len", "slots", "positions", "block_table"])
def test_what_an_earlier_step_left_in_a_buffer_is_noticed(
    on_torch: tuple[Any, LoadedModel], monkeypatch: pytest.MonkeyPatch, stale: str
) -> None:
    """Negative control: each buffer is read, so that one that is not brought up to date shows."""
    pair = Pair(on_torch[1])
    pair.submit(7, 9, 3)
    assert pair.run() < CLOSE
    begin, upload = Staging.begin, Staging.upload
    before: dict[Staging, torch.Tensor] = {}

    def remembering(self: Staging) -> None:
        before[self] = self.device[stale].clone()  # on CPU the host writes where the device reads
        begin(self)

    def forgetting(self: Staging, last: str, rows: int) -> int:
        sent = upload(self, last, rows)
        if self in [static.staging for static in pair.padded._buffers.values()]:
            self.device[stale].copy_(before[self])
        return sent

    monkeypatch.setattr(Staging, "begin", remembering)
    monkeypatch.setattr(Staging, "upload", forgetting)
    for engine in pair.engines:
        for sequence in list(engine.sequences):
            engine.finish(sequence)
    pair.submit(5, 12, 3)
    with pytest.raises((AssertionError, RuntimeError)):
        assert pair.run() < CLOSE


def test_one_upload_a_step_of_what_is_live(on_torch: tuple[Any, LoadedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_for(on_torch[1])
    steps = engine.runner.static
    uploads: list[int] = []
    upload = Staging.upload

    def noting(*given: Any) -> int:
        uploads.append(upload(*given))
        return uploads[-1]

    monkeypatch.setattr(Staging, "upload", noting)
    for i in range(5):
        engine.submit(f"s{i}", prompt(i, 6), 3, SamplingParams(), root=i)
    while engine.has_work:
        engine.step()
    assert len(uploads) == engine.steps
    sizes = [static.staging._target.numel() for static in steps._buffers.values()]
    assert max(uploads) < max(sizes)


def test_tables_are_rewritten_only_where_they_changed(on_torch: tuple[Any, LoadedModel]) -> None:
    """The host's block tables are those of the step, whatever the one before was."""
    steps = engine_for(on_torch[1]).runner.static
    batch = steps._buffer(4, 4, 16).batch
    for tables in ([[1, 2, 3], [4, 5]], [[1, 2, 3, 6], [4, 7]], [[4, 5, 6]], [[4], [9, 8]], [[4, 5, 6], [9, 8, 1]]):
        host = batch.write_tables(tables)
        assert [row[: len(table)].tolist() for row, table in zip(host, tables, strict=False)] == tables
        assert not any(row[len(table) :].any() for row, table in zip(host, tables, strict=False))


def test_steps_that_are_too_large_are_not_padded(
    on_torch: tuple[Any, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = on_torch
    monkeypatch.setattr(static_steps, "SIZES", (1, 2, 4))
    engine = engine_for(model)
    steps = engine.runner.static
    keys = watch(steps, monkeypatch)
    assert mistakes(plain, short_graph(engine)) == {}
    assert {key is None for key in keys} == {True, False}


def test_what_was_recorded_serves_later_steps(on_torch: tuple[Any, LoadedModel]) -> None:
    """A replay runs on the tensors of the step it was recorded with: contexts that have grown, other sequences."""
    pair = Pair(on_torch[1])
    for _ in range(3):
        pair.submit(3, 9, 12)
        assert pair.run() < CLOSE
        for engine in pair.engines:
            for sequence in list(engine.sequences):
                engine.finish(sequence)
    assert 0 < pair.padded.shares[0].captures == len(pair.padded.shares[0].graphs)
    assert pair.padded.shares[0].replays > 3 * pair.padded.shares[0].captures


def test_a_replay_of_an_old_step_is_noticed(on_torch: tuple[Any, LoadedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: logits that the recording left, instead of those of a replay."""
    pair = Pair(on_torch[1])
    record = type(pair.padded.shares[0].recorder).record

    def once(self: Any, call: Any) -> Any:
        logits = record(self, call)().clone()
        return lambda: logits

    monkeypatch.setattr(type(pair.padded.shares[0].recorder), "record", once)
    pair.submit(3, 9, 12)
    assert pair.run() > 0.01


def test_a_rotation_table_that_grows_leaves_the_recorded_one_alone(on_torch: tuple[Any, LoadedModel]) -> None:
    model = on_torch[1]
    forward = model.forward
    assert isinstance(forward, LeanForward)
    before = forward.stages[0].tables
    copies = [table.clone() for table in before]
    forward.reserve(len(before[0]) + 1)
    after = forward.stages[0].tables
    assert len(after[0]) == 2 * len(before[0])
    assert all(torch.equal(a, b) for a, b in zip(before, copies, strict=True))
    assert all(torch.equal(new[: len(old)], old) for new, old in zip(after, before, strict=True))


@pytest.mark.skipif(not ON_CUDA, reason="CUDA graphs need a GPU")
def test_graphs_are_given_up_where_they_hold_too_much(on_torch: tuple[Any, LoadedModel]) -> None:
    pair = Pair(on_torch[1])
    recorder = pair.padded.shares[0].recorder
    assert isinstance(recorder, CudaGraphs)
    for length in (9, 70):
        pair.submit(3, length, 12)
        assert pair.run() < CLOSE
        for engine in pair.engines:
            for sequence in list(engine.sequences):
                engine.finish(sequence)
        recorder.max_bytes = -1  # the next capture starts over
    assert 0 < len(pair.padded.shares[0].graphs) < pair.padded.shares[0].captures


@pytest.mark.skipif(not ON_CUDA, reason="only CUDA has anything to wait for")
@pytest.mark.parametrize("eager", [True, False])
def test_nothing_waits_for_the_device_before_sampling(on_torch: tuple[Any, LoadedModel], eager: bool) -> None:
    engine = engine_for(on_torch[1], eager=eager)
    steps = engine.runner.static
    for i in range(3):
        engine.submit(f"s{i}", prompt(i, 6), 9, SamplingParams(), root=i)
    for _ in range(4):
        engine.step()
    plan = engine.scheduler.schedule()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            steps.run(steps.pack(plan.work))
        with pytest.raises(RuntimeError):
            torch.ones(1, device=DEVICE).item()  # negative control
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("eager", [True, False])
def test_the_setting_reaches_the_runner(on_torch: tuple[Any, LoadedModel], eager: bool) -> None:
    ready = Solver.load(RunConfig(kv_blocks=400))
    ready.model.forward, ready.model.attend = on_torch[1].forward, on_torch[1].attend
    engine = engine_of(Solver(ready.model, RunConfig(kv_blocks=400, draft="off", eager=eager)))
    assert engine.runner.static.pad is not eager
