"""When a profile records: off is off, on is on in its window only, and what ends it early."""

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, record_function

import rrm_engine.trace.profile as profile_module
from rrm_engine import Solver
from rrm_engine.bench.tasks import load_tasks
from rrm_engine.config import RunConfig
from rrm_engine.trace.profile import WARM_UP, Profile, ProfileError
from rrm_engine.trace.profile_reader import read_profile


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of every record_function that is made."""
    names: list[str] = []
    init = record_function.__init__

    def counting(self: record_function, name: str, args: str | None = None) -> None:
        names.append(name)
        init(self, name, args)

    monkeypatch.setattr(record_function, "__init__", counting)
    return names


def test_off_makes_no_range_and_on_makes_them_in_its_window_only(
    solver: Solver, made: list[str], tmp_path: Path
) -> None:
    task = load_tasks("embedded").tasks[0].problem
    plain = solver.solve(task)
    steps = solver.engine.steps
    assert steps > WARM_UP + 20 and made == []
    with solver.profile(tmp_path, 5):
        profiled = solver.solve(task)
    assert made.count("step") == made.count("sample") == 5  # control: the count sees them
    assert solver.engine.steps > steps + WARM_UP + 5
    made.clear()
    again = solver.solve(task)
    assert made == [] and plain.answer == profiled.answer == again.answer
    assert (read_profile(tmp_path) or pytest.fail()).outer[0].args["step"] == steps + WARM_UP + 1


def test_the_benchmark_compares_with_an_engine_without_ranges() -> None:
    path = Path(__file__).parents[3] / "benchmarks" / "profile_overhead.py"
    spec = importlib.util.spec_from_file_location("profile_overhead", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.methods_without_ranges(module.MODULES)
    assert {"_launch", "_collected", "run", "step", "_read"} <= {name for _, name, *_ in found}
    for _, _, as_is, without in found:
        assert {"ranges", "_ranges"} & set(inspect.unwrap(as_is).__code__.co_names)
        assert not {"ranges", "_ranges"} & set(inspect.unwrap(without).__code__.co_names)


def test_an_interrupted_run_leaves_a_profile_of_what_there_was(tmp_path: Path) -> None:
    solver = Solver.load(RunConfig())

    def interrupt(event: dict[str, Any]) -> None:
        if event["event"] == "pause":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), solver.profile(tmp_path, 10_000):
        solver.solve(load_tasks("embedded").tasks[0].problem, on_event=interrupt)
    found = read_profile(tmp_path)
    assert found is not None and sum(outer.name == "step" for outer in found.outer) > 5
    solver.close()


def test_a_run_without_a_step_after_the_warm_up_says_so(solver: Solver, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="there were 0 steps"), solver.profile(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_device_decides_what_is_recorded(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No device is needed to see what torch is asked for."""
    asked: list[Any] = []

    class Asked:
        def __init__(self, activities: list[ProfilerActivity]) -> None:
            asked.extend(activities)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: Any) -> None: ...

    monkeypatch.setattr(profile_module, "profile", Asked)
    Profile(torch.device(device))
    assert (
        asked == 2 * [ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + (device == "cuda")]
    )  # to warm up, and to use


def test_the_end_waits_for_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        def __init__(self, activities: list[ProfilerActivity]) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_: Any) -> None: ...

        def start(self) -> None: ...

        def stop(self) -> None:
            assert sorted(map(str, waited)) == ["cuda:0", "cuda:1"]
            waited.clear()

    waited: list[torch.device] = []
    monkeypatch.setattr(profile_module, "profile", Silent)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    profile = Profile(first, 1, warm_up=0, devices=[first, first, second])
    with profile.step(1):
        assert waited == []
    assert (waited, profile.recorded) == ([], 1)
