"""A job's result, put together from its nodes, its meter and its backend's costs."""

from collections import Counter
from collections.abc import Collection
from dataclasses import fields
from time import monotonic
from typing import Any

from rrm_engine.graph.machine import Machine
from rrm_engine.graph.types import EndReason, Finish, Phase
from rrm_engine.solver.backend import Costs
from rrm_engine.solver.metering import Meter
from rrm_engine.solver.node import NodeRun
from rrm_engine.solver.result import Job, JobResult

# The flag of each phase's token budget; the graph phase is the planner's.
BUDGETS = {
    Phase.DIRECT: "direct_max_tokens",
    Phase.GRAPH: "planner_max_tokens",
    Phase.SOLVER: "solver_max_tokens",
    Phase.CONTINUATION: "continuation_max_tokens",
}
# By setting, the graph machine's name for refusing a child because of that limit.
REFUSALS = {"max_depth": "over_depth", "max_sibling_width": "over_width", "max_nodes": "over_nodes"}


def outcome(
    job: Job,
    finish: Finish,
    nodes: Collection[NodeRun],
    meter: Meter,
    costs: Costs,
    machine: Machine,
    without_room: int,
    **more: Any,
) -> JobResult:
    """The result of a job that ends now; ``more`` are further fields of it."""
    answering = [n for n in ("root", "root!direct") if n in meter.clocks]
    return JobResult(
        job=job,
        status=finish.status,
        answer=finish.answer,
        latency_s=monotonic() - meter.started_at,
        ttft_s=meter.ttft_s,
        time_to_first_child_s=meter.time_to_first_child_s,
        model_calls=len(nodes),
        critical_path_tokens=sum(meter.clocks[n].chain.tokens for n in answering),
        critical_path_steps=sum(meter.clocks[n].chain.steps for n in answering),
        nodes=len(nodes),
        max_depth=machine.max_depth,
        max_sibling_width=machine.max_sibling_width,
        overlap_s=meter.overlap_s,
        parallel_s=meter.parallel_s,
        resumes=sum(len(n.reasons) - 1 for n in nodes if n.reasons),
        resume_latency_s=meter.resume_latency_s,
        finish_reasons={n.path: "+".join(n.reasons) for n in nodes},
        cut=_cut(nodes, machine, without_room),
        **{f.name: getattr(costs, f.name) for f in fields(costs)},
        **more,
    )


def _cut(nodes: Collection[NodeRun], machine: Machine, without_room: int) -> dict[str, int]:
    """By setting, how often its limit ended a phase or refused a node."""
    ends = Counter((phase, reason) for node in nodes for phase, reason in zip(node.phases, node.reasons, strict=True))
    found = {flag: ends[phase, EndReason.LENGTH] for phase, flag in BUDGETS.items()}
    found["max_sequence_tokens"] = without_room + sum(ends[phase, EndReason.CONTEXT] for phase in Phase)
    found |= {setting: machine.repairs[repair] for setting, repair in REFUSALS.items()}
    return {setting: count for setting, count in found.items() if count}
