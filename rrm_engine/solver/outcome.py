"""A job's result, from what its nodes, its clocks and its joins counted."""

from collections import Counter
from collections.abc import Collection
from dataclasses import asdict
from time import monotonic
from typing import Any

from rrm_engine.backends.settings import BUDGETS
from rrm_engine.backends.shadow import SpliceReport
from rrm_engine.graph.machine import GraphMachine
from rrm_engine.graph.types import EndReason, Finish, Phase
from rrm_engine.solver.metering import Meter
from rrm_engine.solver.node import NodeRun
from rrm_engine.solver.result import Job, JobResult

# What the graph machine calls it when a child is refused for a limit.
REFUSALS = {"max_depth": "over_depth", "max_sibling_width": "over_width", "max_nodes": "over_nodes"}


def outcome(
    job: Job,
    finish: Finish,
    nodes: Collection[NodeRun],
    meter: Meter,
    text_joins: int,
    reports: Collection[SpliceReport],
    machine: GraphMachine | None,
    without_room: int,
    **more: Any,
) -> JobResult:
    """The result of a job that ends now; ``more`` are fields of it that these do not know."""

    def total(name: str) -> int:
        return sum(getattr(node.sequence.counters, name) for node in nodes)

    answering = [n for n in ("root", "root!direct") if n in meter.clocks]
    return JobResult(
        job=job,
        status=finish.status,
        answer=finish.answer,
        latency_s=monotonic() - meter.started_at,
        ttft_s=meter.ttft_s,
        time_to_first_child_s=meter.time_to_first_child_s,
        model_calls=len(nodes),
        forward_prefilled=total("prefilled"),
        forward_decoded=total("decoded"),
        reused=total("reused"),
        critical_path_tokens=sum(meter.clocks[n].depth for n in answering),
        total_tokens=total("decoded"),
        nodes=len(nodes),
        max_depth=machine.max_depth if machine else 0,
        max_sibling_width=machine.max_sibling_width if machine else 0,
        overlap_s=meter.overlap_s,
        parallel_s=meter.parallel_s,
        resumes=sum(len(n.sampled) - 1 for n in nodes if n.sampled),
        resume_latency_s=meter.resume_latency_s,
        forked_blocks=total("forked_blocks"),
        copied_blocks=total("copied_blocks"),
        preemptions=total("preemptions") + total("dropped"),
        offloaded_blocks=total("offloaded_blocks"),
        restored_blocks=total("restored_blocks"),
        spliced_tokens=total("spliced"),
        splice_report=[asdict(report) for report in reports],
        text_joins=text_joins,
        finish_reasons={n.path: "+".join(n.reasons) for n in nodes},
        cut=_cut(nodes, machine, without_room),
        **more,
    )


def _cut(nodes: Collection[NodeRun], machine: GraphMachine | None, without_room: int) -> dict[str, int]:
    """How often the limit of which setting ended a phase, or refused a node."""
    ends = Counter((phase, reason) for node in nodes for phase, reason in zip(node.phases, node.reasons, strict=True))
    found = {flag: ends[phase, EndReason.LENGTH] for phase, flag in BUDGETS.items()}
    found["max_sequence_tokens"] = without_room + sum(ends[phase, EndReason.CONTEXT] for phase in Phase)
    found |= {setting: machine.repairs[repair] for setting, repair in REFUSALS.items()} if machine else {}
    return {setting: count for setting, count in found.items() if count}
