"""A model named ``rrm`` for EleutherAI's lm-evaluation-harness: its prompts are tasks to solve.

Importing this module registers it. Where a release of the harness reads the entry points ``lm_eval.models``, that is
not needed; ``python -m rrm_engine.harness`` is the harness's command line for the others.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, NoReturn

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from rrm_engine.backends.local import Solver
from rrm_engine.errors import RrmError
from rrm_engine.harness.settings import SAMPLING, Settings, config_of, cut, lengths
from rrm_engine.solver.result import Job

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
KNOWN = frozenset({"until", "do_sample", *SAMPLING, *LENGTHS})
IGNORED = ("batch_size", "max_batch_size")  # which the harness gives every model
UNASKED = "cuda:0"  # the harness's --device where nobody gave one, also on machines without it

log = logging.getLogger(__name__)


@register_model("rrm")
class RrmModel(LM):
    """Answers requests to generate by solving them, directly or recursively, on the engine in this process.

    ``mode`` is ``rrm`` or ``direct``, ``concurrency`` how many requests are in flight; other arguments are settings of
    `RunConfig` (``pretrained`` is ``model``). An answer is what the solve concludes, cut at the first of the request's
    ``until``. No phase of a node writes more tokens than ``max_gen_toks``. A request that comes several times is a
    sample each time, with noise of its own; without ``do_sample`` or a temperature it is answered greedily.

    Raises RrmError for what cannot be done, such as scoring given texts.
    """

    def __init__(self, mode: str = "rrm", concurrency: int = 8, pretrained: str | None = None, **settings: Any) -> None:
        super().__init__()
        asked = {name: value for name, value in settings.items() if name not in IGNORED and value is not None}
        if asked.get("device") == UNASKED:
            del asked["device"]
        if pretrained is not None:
            asked.setdefault("model", pretrained)
        self.mode, self.concurrency = mode, concurrency
        self.config = config_of(mode, asked, "--model_args")
        self._solver = Solver.load(self.config)

    @property
    def tokenizer_name(self) -> str:
        """What the harness names caches after."""
        return str(self.config.model)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Refused: a solve writes its own conversation."""
        raise RrmError("rrm puts tasks into the model's chat template itself: leave --apply_chat_template out")

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> NoReturn:
        """Refused: see ``generate_until``."""
        raise RrmError(
            "rrm solves tasks by writing and cannot score given texts (loglikelihood, multiple_choice): choose a task "
            "with output_type generate_until"
        )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> NoReturn:
        """Refused: see ``generate_until``."""
        self.loglikelihood(requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each request's (context, generation settings), in order; "" where a solve failed."""
        groups: dict[Settings, list[tuple[int, Job]]] = {}
        seen: Counter[str] = Counter()
        for number, request in enumerate(requests):
            context, asked = request.args
            name = f"{request.task_name or 'request'}:{request.doc_id or 0}:{request.idx}"
            job = Job(name, context, self.mode, seen[name])
            seen[name] += 1
            groups.setdefault(self._settings(asked), []).append((number, job))
        answers = [""] * len(requests)
        for settings, jobs in groups.items():
            for number, text in self._solved(settings, jobs):
                until = requests[number].args[1].get("until") or ()
                answers[number] = cut(text, *([until] if isinstance(until, str) else until))
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _settings(self, asked: Mapping[str, Any]) -> Settings:
        """What the harness asks of generation, as settings of a solve."""
        if unknown := sorted(asked.keys() - KNOWN):
            raise RrmError(f"generation_kwargs: rrm has no {unknown[0]}; it takes {', '.join(sorted(KNOWN))}")
        found: dict[str, Any] = {name: asked[name] for name in SAMPLING if asked.get(name) is not None}
        samples = asked.get("do_sample", found.get("temperature", self.config.temperature or 0) > 0)
        if not samples:
            found = {"temperature": 0.0}
        length = next((asked[name] for name in LENGTHS if asked.get(name) is not None), None)
        if length is not None:
            found |= lengths(self._solver.resolved, int(length))
        return tuple(sorted(found.items()))

    def _solved(self, settings: Settings, jobs: Sequence[tuple[int, Job]]) -> list[tuple[int, str]]:
        """By the request's number what its solve concluded."""
        numbers = {job.key: number for number, job in jobs}
        tasks, failed, found = [job.task for _, job in jobs], 0, list[tuple[int, str]]()
        solver = Solver(self._solver.model, replace(self.config, **dict(settings)), tasks, self._solver.replicas)
        with closing(solver.run([job for _, job in jobs], concurrency=self.concurrency)) as results:
            for result in results:
                found.append((numbers[result.job.key], "" if result.error else result.answer))
                failed += result.error is not None
                if result.error is not None:
                    log.warning("%s: %s", result.job.key, result.error)
        solver.close()
        if failed:
            log.warning("%d of %d requests failed and are answered with nothing", failed, len(jobs))
        return found
