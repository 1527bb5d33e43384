"""The rules that emulated GPUs keep: what breaks one is noticed, what keeps it is not."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton (Linux)")
from emulated_cuda import Emulation, emulated

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="real devices are there")
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


def test_tensors_of_two_devices_do_not_mix(cuda: Emulation) -> None:
    here, there = torch.ones(3, device=FIRST), torch.ones(3, device=SECOND)
    assert (here + 1).tolist() == [2, 2, 2] and (here + torch.tensor(1.0)).tolist() == [2, 2, 2]
    for mixed in (lambda: here + there, lambda: here + torch.ones(3), lambda: here[torch.zeros(3, dtype=torch.int64)]):
        with pytest.raises(AssertionError, match="tensors on cuda:0 and"):
            mixed()
    with pytest.raises(AssertionError, match="launched on cuda:0 is given a tensor on cuda:1"):
        cuda.kernel(torch.add, there, 1)
    with torch.cuda.device(1):
        cuda.kernel(torch.Tensor.add_, there, 1)
    assert there.to("cpu").tolist() == [2, 2, 2]


@pytest.mark.parametrize("waits", [True, False])
def test_streams_are_ordered_by_events_only(cuda: Emulation, waits: bool) -> None:
    numbers, side = torch.zeros(3, device=FIRST), torch.cuda.Stream(FIRST)
    numbers += 1
    if waits:
        side.wait_stream(torch.cuda.current_stream(FIRST))
    with torch.cuda.stream(side), nullcontext() if waits else pytest.raises(AssertionError, match="a race"):
        numbers += 1
    torch.cuda.synchronize(FIRST)
    assert numbers.tolist() == [1 + waits] * 3


@pytest.mark.parametrize("told", [True, False])
def test_memory_is_not_given_back_while_another_stream_may_use_it(monkeypatch: pytest.MonkeyPatch, told: bool) -> None:
    noticed = nullcontext() if told else pytest.raises(AssertionError, match="given back")
    with noticed, emulated(1, monkeypatch):
        numbers, side = torch.zeros(3, device=FIRST), torch.cuda.Stream(FIRST)
        side.wait_stream(torch.cuda.current_stream(FIRST))
        with torch.cuda.stream(side):
            more = numbers + 1
        if told:
            numbers.record_stream(side)
        del numbers
        torch.cuda.synchronize(FIRST)
        assert more.tolist() == [1, 1, 1]


def test_the_host_has_what_it_waited_for_and_no_more(cuda: Emulation) -> None:
    numbers, host = torch.ones(3, device=FIRST), torch.zeros(3).pin_memory()
    host.copy_(numbers, non_blocking=True)
    there = torch.cuda.Event()
    there.record()
    assert host.isnan().all()
    there.synchronize()
    assert host.tolist() == [1, 1, 1]
    plain = torch.zeros(3)
    plain.copy_(numbers, non_blocking=True)
    assert plain.tolist() == [1, 1, 1], "what is not pinned is waited for"
    assert torch.empty(3, device=FIRST).isnan().all()


def test_what_is_being_copied_must_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="overwritten"), emulated(1, monkeypatch):
        host = torch.ones(3).pin_memory()
        assert host.to(FIRST, non_blocking=True).tolist() == [1, 1, 1]
        host += 1  # not yet the mistake: the host has waited for the copy, when it read the list
        host.to(FIRST, non_blocking=True)
        host += 1


def test_a_replay_runs_what_was_issued_on_what_is_there_now(cuda: Emulation) -> None:
    given, factor = torch.ones(3, device=FIRST), [2.0]

    def capture(pool: Any) -> tuple[Any, torch.Tensor]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(FIRST)
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            doubled = given * factor[0]
            doubled += 1
        return graph, doubled

    pool = torch.cuda.graph_pool_handle()
    (one, result), (other, _) = capture(pool), capture(pool)
    assert all(map(math.isnan, result.tolist())), "nothing has been computed yet"
    given += 4
    factor[0] = 100.0
    one.replay()
    assert result.tolist() == [11, 11, 11]
    other.replay()
    assert all(map(math.isnan, result.tolist())), "another graph of the pool has run since"


@pytest.mark.parametrize(
    "waits", [lambda t: t.tolist(), lambda t: t[0].item(), lambda t: t.to("cpu"), lambda t: bool(t[0])]
)
def test_nothing_waits_while_a_graph_is_captured(cuda: Emulation, waits: Callable[[torch.Tensor], Any]) -> None:
    numbers, graph, stream = torch.ones(3, device=FIRST), torch.cuda.CUDAGraph(), torch.cuda.Stream(FIRST)
    captured = torch.cuda.graph(graph, pool=None, stream=stream)
    with pytest.raises(AssertionError, match="while a graph is captured"), captured:
        waits(numbers + 1)


def test_an_event_belongs_to_the_device_of_its_first_stream(cuda: Emulation) -> None:
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(FIRST))
    torch.cuda.current_stream(SECOND).wait_event(event)
    with pytest.raises(AssertionError, match="an event of cuda:0"):
        event.record(torch.cuda.current_stream(SECOND))
