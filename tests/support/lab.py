"""Whole recursive runs of a tiny random model that leans to writing events, with all that tests look at.

Under the event grammar even a random model writes valid graphs: random splits, dependencies, depths and failures.
"""

import copy
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from oracle import chat_model, chat_tokenizer, sample
from tokenizers import pre_tokenizers

from rrm_engine.backends.local import Solver
from rrm_engine.config import RunConfig
from rrm_engine.engine.engine import Engine
from rrm_engine.engine.sequence import Sequence
from rrm_engine.loading.prepare import LoadedModel, prepare_model
from rrm_engine.solver.result import Job, JobResult

STYLE = """
name = "terse"
description = "For tests: as short as a style can be."
trained_on_events = false
thinking = { direct = false, graph = false, solver = false, continuation = false }
budgets = { direct = 24, planner = 120, solver = 24, continuation = 90 }
system = { direct = "Solve.", recursive = "Split or solve. Write events." }
[user]
direct = "{{ task }}"
graph = "Problem: {{ task }}{% for p in given %} {{ p.id }}={{ p.final }}{% endfor %} Split?"
solver = "Problem: {{ task }}{% for p in given %} {{ p.id }}={{ p.final }}{% endfor %} Solve!"
resume = "{% for c in conclusions %}{{ c.id }}={{ c.final }} {% endfor %}{% for n in notes %}{{ n }} {% endfor %}Go on."
solve = "Now solve it."
fork = "You are {{ id }}: {{ task }}{% for p in given %} {{ p.id }}={{ p.final }}{% endfor %} {{ depth_left }}"
"""
# What the tokenizer is trained on.
WRITING = """{"type":"child","id":"c1","task":"a","depends_on":[]}
{"type":"child","id":"c2","task":"b","depends_on":["c1"]}
{"type":"child","id":"c3","task":"c","depends_on":["c1","c2"]}
{"type":"await","children":["c1","c2","c3"],"rule":"r"}
{"type":"atomic","answer":"FINAL: 7"}
{"type":"done"}
{"type":"atomic"}
FINAL: 1 FINAL: x FINAL: -2 "FINAL: (nFINAL: aaFINAL: bxFINAL: c.FINAL: q;FINAL: y
Problem: the Split? Solve! Go on. Now solve it. You are Split or solve. Write events."""
LEANINGS = {'{"': 9.0, '"': 7.0, "FINAL": 6.0, "<|im_end|>": 7.0, "c": -1.5}
VOCABULARY = 400
TASKS = ["Add 2 and 3.", "How many days?", "x", "Find the remainder of 7 by 4, twice."]
JOBS = [Job(f"t{i}", task) for i, task in enumerate(TASKS)]
SETTINGS: dict[str, Any] = {
    "constrain": "on",
    "draft": "off",
    "temperature": 1.0,
    "top_k": 0,
    "seed": 25,
    "max_depth": 2,
    "max_sibling_width": 3,
    "max_nodes": 500,  # never reached: which nodes a limit hits depends on who declares first
    "kv_blocks": 400,
    "max_sequence_tokens": 800,
}
SMALLEST = 50  # blocks of 16 for one sequence of ``max_sequence_tokens``


@dataclass
class Lab:
    """What all tests share: the model, plain and prepared, and the style."""

    plain: Any
    model: LoadedModel
    style: Path

    def solver(self, **changes: Any) -> Solver:
        return Solver(self.model, RunConfig(**{"prompt_style": str(self.style), **SETTINGS, **changes}), TASKS)


def make_lab(folder: Path) -> Lab:
    """A tiny random Qwen3 and a style, which is written to ``folder``."""
    style = folder / "terse.toml"
    style.write_text(STYLE)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = chat_tokenizer([WRITING] * 3, vocab_size=VOCABULARY - 2, initial_alphabet=alphabet, max_token_length=12)
    changes = {"vocab_size": VOCABULARY, "pad_token_id": tokenizer.eos_token_id}
    plain = chat_model(tokenizer, LEANINGS, initializer_range=0.15, **changes)
    return Lab(plain, prepare_model(copy.deepcopy(plain), tokenizer, "tiny"), style)


@dataclass
class Recorded:
    """A run with its events, and for each sequence what it was told to sample with, phase by phase."""

    solver: Solver
    results: dict[str, JobResult] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    phases: dict[str, list[SimpleNamespace]] = field(default_factory=lambda: defaultdict(list))

    def run(self, jobs: list[Job], concurrency: int) -> "Recorded":
        engine = engine_of(self.solver)
        submit, resume = engine.submit, engine.resume

        def note(sequence: Sequence, fresh: Any) -> None:
            phase = SimpleNamespace(sampling=sequence.sampling, noise_key=sequence.noise_key, matcher=fresh)
            self.phases[sequence.key].append(phase)

        def watched_submit(*args: Any, **kwargs: Any) -> Sequence:
            sequence = submit(*args, **kwargs)
            note(sequence, sequence.matcher and sequence.matcher.copy())
            return sequence

        def watched_resume(sequence: Sequence, *args: Any) -> None:
            resume(sequence, *args)
            note(sequence, sequence.matcher and sequence.matcher.copy())

        engine.submit, engine.resume = watched_submit, watched_resume  # type: ignore[method-assign, assignment]
        for result in self.solver.run(jobs, self.events.append, concurrency):
            self.results[result.job.key] = result
        engine.check()
        assert engine.pool.num_used == 0
        return self

    def ends(self) -> dict[str, dict[str, Any]]:
        """The last event of every node that had a sequence, by sequence key."""
        return {f"{e['job']}:{e['node']}": e for e in self.events if "token_ids" in e}

    def rows(self) -> dict[str, Any]:
        """Everything about a run that must not depend on memory or batching: each token of each node included."""
        rows: dict[str, Any] = {
            key: (r.status, r.answer, r.nodes, r.total_tokens, r.critical_path_tokens, r.finish_reasons, r.repairs)
            for key, r in self.results.items()
        }
        return rows | {key: (e["token_ids"], e["sampled"], e["event"]) for key, e in self.ends().items()}


def recorded(lab: Lab, jobs: list[Job] = JOBS, concurrency: int = 4, **changes: Any) -> Recorded:
    return Recorded(lab.solver(**changes)).run(jobs, concurrency)


@torch.inference_mode()
def wrong_tokens(plain: Any, run: Recorded) -> dict[str, list[int]]:
    """Positions where plain transformers on a node's own transcript, its grammar and its noise say another token."""
    wrong: dict[str, list[int]] = defaultdict(list)
    for key, end in run.ends().items():
        tokens, phases = end["token_ids"], run.phases[key]
        logits = plain(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        for (start, stop), phase in zip(end["sampled"], phases, strict=True):
            matcher = phase.matcher and phase.matcher.copy()
            for i in range(start, stop):
                place = SimpleNamespace(**{**vars(phase), "matcher": matcher}, tokens=tokens[:i])
                if sample(logits[i - 1 : i].clone(), [place]) != [tokens[i]]:
                    wrong[key].append(i)
                if matcher is not None:
                    matcher.accept(tokens[i])
    return dict(wrong)


def engine_of(solver: Solver) -> Engine:
    """The one engine of a solver that has no replicas."""
    assert isinstance(solver.engine, Engine)
    return solver.engine


def idle(solver: Solver) -> bool:
    engine = engine_of(solver)
    engine.check()
    return engine.pool.num_used == 0 and not engine.has_work and not engine.scheduler.paused
