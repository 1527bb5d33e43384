"""What the sections share: the device, the model, clocks, and how a section is run so that its failure is its own."""

import gc
import signal
import statistics
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch

from rrm_engine.loading.geometry import GEOMETRIES, random_model
from rrm_engine.loading.prepare import LoadedModel, prepare_model

Row = dict[str, Any]
BLOCK_SIZE = 16
CACHE_BYTES = 256 << 20  # more than any device's last cache holds
TINY: dict[str, Any] = GEOMETRIES["qwen3-0.6b"] | {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}


class Skip(Exception):
    """A section, or the rest of it, cannot run here; the message says why."""


class TimeUp(BaseException):
    """A section's time limit has passed; what it has measured is kept."""


@dataclass
class Lab:
    """One device, one model. ``tiny``: shapes so small that everything runs on a CPU in a minute."""

    device: torch.device
    geometry: str
    attention: str = "auto"
    tiny: bool = False
    dtype: str = "bfloat16"
    copy_bytes_per_s: float = 0.0  # measured, bytes read and written
    _model: LoadedModel | None = None

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def model(self) -> LoadedModel:
        """The model with random weights, made at the first call."""
        if self._model is None:
            self._model = self.ready(self.plain_model())
        return self._model

    def plain_model(self) -> Any:
        """The same model as transformers makes it."""
        return random_model(TINY if self.tiny else GEOMETRIES[self.geometry], self.dtype, self.device)

    def ready(self, plain: Any) -> LoadedModel:
        no_tokenizer: Any = SimpleNamespace(eos_token_id=None)  # nothing is read or written as text
        return prepare_model(plain, no_tokenizer, self.geometry, self.device, self.attention)

    def synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def tidy(self) -> None:
        """Give back what the last section left."""
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()

    def seconds(self, function: Callable[[], Any], repeats: int = 5, warm: int = 2) -> float:
        """Median time of a call, the device's work included."""
        times = []
        for turn in range(warm + repeats):
            self.synchronize()
            began = perf_counter()
            function()
            self.synchronize()
            if turn >= warm:
                times.append(perf_counter() - began)
        return statistics.median(times)

    def kernel_seconds(self, function: Callable[[], Any], calls: int = 10) -> float:
        """Time of a call without the host's, on CUDA, its data not in the device's cache: as in a model's layer.

        There ``calls`` of them are captured and replayed as one graph, each after a write that fills the cache; the
        time of these writes alone is taken off.
        """
        if not self.on_cuda:
            return self.seconds(function, repeats=3, warm=1)
        rubbish = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=self.device)

        def cold() -> None:
            rubbish.zero_()
            function()

        return (self._replayed(cold, calls) - self._replayed(rubbish.zero_, calls)) / calls

    def _replayed(self, function: Callable[[], Any], calls: int) -> float:
        function()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                function()
        return self.seconds(graph.replay)


@dataclass
class Section:
    """``run`` appends rows as it measures, so that they are kept whatever happens next."""

    name: str
    title: str
    limit_s: float
    run: Callable[[Lab, list[Row]], None]
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None
    skipped: str | None = None

    def carry_out(self, lab: Lab, limit_s: float) -> None:
        """Run for at most ``limit_s``; an error is recorded and goes no further."""
        began = perf_counter()
        try:
            with _alarm(limit_s), torch.no_grad():
                self.run(lab, self.rows)
        except Skip as reason:
            self.skipped = str(reason)
        except TimeUp:
            self.error = f"not finished in {limit_s:.0f} s; what was measured until then is kept"
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        self.seconds = perf_counter() - began
        lab.tidy()

    def as_json(self) -> dict[str, Any]:
        kept = ("title", "limit_s", "seconds", "error", "skipped", "rows")
        return {name: getattr(self, name) for name in kept}


@contextmanager
def _alarm(limit_s: float) -> Iterator[None]:
    """Raise TimeUp in the block once ``limit_s`` have passed, as soon as Python runs again."""

    def up(*_: Any) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, up)
    signal.setitimer(signal.ITIMER_REAL, max(limit_s, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def random_tokens(count: int, vocabulary: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocabulary, (count,), generator=generator).tolist()
