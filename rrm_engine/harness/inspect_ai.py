"""A model provider named ``rrm`` for the UK AI Security Institute's Inspect (``inspect eval ... --model rrm/MODEL``).

Inspect finds it by the entry point ``inspect_ai``; in Python, importing this module registers it.
"""

from collections import Counter
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace
from hashlib import sha256
from threading import Lock
from time import sleep
from typing import Any

from anyio import CapacityLimiter, to_thread
from inspect_ai.model import ChatMessage, GenerateConfig, ModelAPI, ModelOutput, ModelUsage, modelapi
from inspect_ai.tool import ToolChoice, ToolInfo

from rrm_engine.backends.local import Solver
from rrm_engine.errors import RrmError
from rrm_engine.harness.settings import SAMPLING, Settings, config_of, cut, lengths
from rrm_engine.solver.result import Job, JobResult

REFUSED = (
    "best_of",
    "num_choices",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "logprobs",
    "response_schema",
)
GATHER_S = 0.05  # how long a request waits for others that come at the same time

Asked = tuple[Settings, Job, "Future[JobResult]"]


@modelapi(name="rrm")
class RrmAPI(ModelAPI):
    """Answers a request by solving its messages as one task, directly or recursively, on the engine in this process.

    ``mode`` is ``rrm`` or ``direct``, ``concurrency`` how many requests are in flight; other arguments are settings of
    `RunConfig`. Requests that wait are solved as one batch. A request that comes several times, as in epochs, is a
    sample each time, with noise of its own. No phase of a node writes more tokens than ``max_tokens``.

    Raises RrmError for what cannot be done, such as tools or the answers of a conversation.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008  (as Inspect's own)
        mode: str = "rrm",
        concurrency: int = 8,
        **settings: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        self.mode, self.concurrency = mode, concurrency
        self.config = config_of(mode, {"model": model_name, **settings}, "-M")
        self._solver = Solver.load(self.config)
        self._limiter = CapacityLimiter(concurrency)
        self._seen: Counter[str] = Counter()
        self._waiting: list[Asked] = []
        self._list, self._turn = Lock(), Lock()  # of those that wait; of solving

    def max_connections(self) -> int:
        """How many requests Inspect should have in flight."""
        return self.concurrency

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """What the solve concludes."""
        if tools:
            raise RrmError("rrm solves tasks by itself and calls no tools: choose an evaluation without them")
        if any(message.role not in ("system", "user") for message in input):
            raise RrmError("rrm takes a task, not a conversation: choose an evaluation with one turn")
        task = "\n\n".join(message.text for message in input)
        settings = self._settings(config)
        name = sha256(repr((task, settings)).encode()).hexdigest()[:16]
        job = Job(name, task, self.mode, self._seen[name])
        self._seen[name] += 1
        asked: Asked = (settings, job, Future())
        with self._list:
            self._waiting.append(asked)
        result = await to_thread.run_sync(self._result, asked, limiter=self._limiter)
        if result.error is not None:
            raise RuntimeError(result.error)
        output = ModelOutput.from_content(self.model_name, cut(result.answer, *(config.stop_seqs or ())))
        output.usage = ModelUsage(output_tokens=result.total_tokens, total_tokens=result.total_tokens)
        output.time = result.latency_s
        output.metadata = {
            "status": str(result.status),
            "nodes": result.nodes,
            "critical_path_tokens": result.critical_path_tokens,
        }
        return output

    def _settings(self, config: GenerateConfig) -> Settings:
        """What Inspect asks of generation, as settings of a solve."""
        for name in REFUSED:
            if getattr(config, name) not in (None, 1, False):
                raise RrmError(f"rrm has no {name}: leave it out")
        found = {name: value for name in (*SAMPLING, "seed") if (value := getattr(config, name, None)) is not None}
        if config.max_tokens is not None:
            found |= lengths(self._solver.resolved, config.max_tokens)
        return tuple(sorted(found.items()))

    def _result(self, asked: Asked) -> JobResult:
        """The caller whose turn it is solves for all that wait and ask for the same settings."""
        settings, _, future = asked
        with self._turn:
            if not future.done():
                sleep(GATHER_S)
                self._solve(settings, self._taken(settings))
        return future.result()

    def _taken(self, settings: Settings) -> list[Asked]:
        with self._list:
            batch = [one for one in self._waiting if one[0] == settings]
            self._waiting = [one for one in self._waiting if one[0] != settings]
        return batch

    def _solve(self, settings: Settings, batch: list[Asked]) -> None:
        futures = {job.key: future for _, job, future in batch}
        try:
            tasks = [job.task for _, job, _ in batch]
            solver = Solver(self._solver.model, replace(self.config, **dict(settings)), tasks, self._solver.replicas)
            with closing(solver.run([job for _, job, _ in batch], concurrency=self.concurrency)) as results:
                for result in results:
                    futures.pop(result.job.key).set_result(result)
            solver.close()
        except Exception as error:
            for future in futures.values():
                future.set_exception(error)
