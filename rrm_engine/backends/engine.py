"""The engine in this process as a backend: every node is a sequence of one continuous batch."""

from collections import deque
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager
from time import monotonic
from typing import Any

from rrm_engine.backends.session import EngineSession, Writing
from rrm_engine.config import EngineConfig
from rrm_engine.device.memory import is_out_of_memory
from rrm_engine.engine.ranges import Ranges
from rrm_engine.graph.paths import NodeKey
from rrm_engine.graph.types import Phase
from rrm_engine.protocol.thinking import Marks
from rrm_engine.solver.backend import Capabilities, Written

RATE_WINDOW_S = 2.0  # over which the tokens per second shown live are counted


class EngineBackend:
    """See `solver.backend.Backend`. ``config`` is the resolved one, which explanations of errors quote."""

    def __init__(self, writing: Writing, config: EngineConfig) -> None:
        self.writing = writing
        self.engine = writing.engine
        self.capabilities = Capabilities(forks=True, joins=writing.join.mode != "text")
        self._config = config
        self._sessions: dict[str, EngineSession] = {}
        self._recent: deque[tuple[float, int]] = deque()  # by step: when it was over, and its tokens

    @property
    def marks(self) -> Marks:
        return self.writing.chat.marks

    @property
    def steps(self) -> int:
        return self.engine.steps

    @property
    def used_blocks(self) -> int:
        return sum(engine.used_blocks for engine in self.engine.engines)

    @property
    def pinned_blocks(self) -> int:
        return sum(engine.pinned_blocks for engine in self.engine.engines)

    @property
    def offloaded_blocks(self) -> int:
        return sum(engine.offloaded_blocks for engine in self.engine.engines)

    @property
    def _ranges(self) -> Ranges:
        return self.engine.engines[0].ranges

    def opens_thinking(self, phase: Phase) -> bool:
        return self.writing.chat.opens_thinking(self.writing.plans[phase].thinking)

    def session(self, job: str, rank: int) -> EngineSession:
        session = self._sessions[job] = EngineSession(self.writing, job, rank, self._forget)
        return session

    def step(self) -> Generator[Written, None, None]:
        with self._ranges.step(self.engine.steps + 1):
            yield from self._written()
            while self.engine.left:
                yield from self._written()

    def _written(self) -> Generator[Written, None, None]:
        """What nodes write with the next token of each sequence."""
        sampled = self.engine.step()
        self._count(sum(not one.sequence.probe.best_effort for one in sampled))
        # The blocks of shadows, which measure splices, do not count as a job's.
        used = self.used_blocks - sum(s.shadows.blocks for s in self._sessions.values())
        for session in self._sessions.values():
            session.peak_blocks = max(session.peak_blocks, used)
        with self._ranges("parse", sampled):
            for one in sampled:
                own = self._sessions.get(NodeKey(one.sequence.key).job)
                if own is not None and (written := own.on_token(one)) is not None:
                    yield written

    def explain(self, error: Exception, job: str) -> str:
        """Names the job's nodes that were in the step, and says what to do."""
        work = self.engine.plan.work if self.engine.plan else ()
        keys = [NodeKey(one.sequence.key) for one in work]
        nodes = ", ".join(dict.fromkeys(key.node for key in keys if key.job == job))
        where = f"in a step of {nodes}" if nodes else "in a step of other jobs"
        if not is_out_of_memory(error):
            return f"{type(error).__name__} {where}: {error}"
        config = self._config
        return (
            f"out of memory on {config.devices or config.device} {where}: "
            f"lower --kv-blocks (now {config.kv_blocks}) or --step-tokens "
            f"(now {config.step_tokens}): {error}"
        )

    def ranges(self, name: str, of: Iterable[str] = ()) -> AbstractContextManager[Any]:
        return self._ranges(name, of)

    def progress(self) -> dict[str, Any]:
        """Sequences and blocks by state now, and tokens per second over the last seconds."""
        span = monotonic() - self._recent[0][0] if self._recent else 0.0
        speed = sum(n for _, n in self._recent) / span if span > 0 else 0.0
        return {**self.engine.progress(), "tokens_per_s": speed}

    def _count(self, tokens: int) -> None:
        now = monotonic()
        self._recent.append((now, tokens))
        while now - self._recent[0][0] > RATE_WINDOW_S:
            self._recent.popleft()

    def _forget(self, job: str) -> None:
        self._sessions.pop(job, None)
