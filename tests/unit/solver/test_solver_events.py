"""The events of whole recursive runs: complete, streamed while they happen, and enough to compute the results from."""

import json
from collections import Counter, defaultdict
from typing import Any

from lab import JOBS, TASKS, Lab, Recorded

from rrm_engine.solver.result import JobResult


def test_stream_yields_the_text_while_it_is_written_and_the_result_last(lab: Lab) -> None:
    solver = lab.solver()
    for task in TASKS:
        events = list(solver.stream(task))
        if (result := events[-1]["result"]).nodes > 3:
            break
    assert result.nodes > 3
    assert [e["event"] for e in events].index("result") == len(events) - 1
    assert isinstance(result, JobResult)
    texts: dict[str, str] = defaultdict(str)
    for event in events:
        if event["event"] == "text":
            texts[event["node"]] += event["text"]
    assert len(texts) == result.nodes
    first_child = next(i for i, e in enumerate(events) if e["event"] == "start" and e["node"] != "root")
    assert any(e["event"] == "text" and e["node"] == "root" for e in events[:first_child])
    for event in events[:-1]:
        if "token_ids" in event and len(event["sampled"]) == 1:
            start, stop = event["sampled"][0]
            written = lab.model.tokenizer.decode(event["token_ids"][start:stop], skip_special_tokens=True)
            assert texts[event["node"]].startswith(written.rstrip("\ufffd"))


def test_events_are_json_and_complete(reference: Recorded) -> None:
    kinds = Counter[str]()
    for event in reference.events:
        again = json.loads(json.dumps(event))
        kinds[again["event"]] += 1
        assert again["job"] in reference.results
        assert {"t", "node", "step", "tokens", "blocks"} <= again.keys()
    nodes = sum(r.nodes for r in reference.results.values())
    assert kinds["start"] == nodes == kinds["concluded"] + kinds["cancelled"]
    assert kinds["resume"] == sum(r.resumes for r in reference.results.values())
    assert kinds["pause"] == kinds["start"] + kinds["resume"]
    assert kinds["finish"] == len(JOBS)
    for key, result in reference.results.items():
        decoded = [e["counters"]["decoded"] for e in reference.events if e["job"] == key and "counters" in e]
        assert sum(decoded) == result.total_tokens


def test_critical_path_from_the_events_alone(reference: Recorded, forked_reference: Recorded) -> None:
    """The longest chain of decoded tokens, computed anew: a child follows its event, a parent its slowest child."""
    for run in (reference, forked_reference):
        for key, result in run.results.items():
            events = [e for e in run.events if e["job"] == key]
            assert critical_path(events) == result.critical_path_tokens
        assert any(r.critical_path_tokens < r.total_tokens for r in run.results.values())


def critical_path(events: list[dict[str, Any]]) -> int:
    """Of one job's events. ``tokens`` of an event is the length of its node's sequence at that moment."""
    base: dict[str, int] = {}  # the chain up to the phase's first token
    first: dict[str, int] = {}  # the sequence's length there
    chain: dict[str, int] = {}  # the chain so far
    declared: dict[str, tuple[int, list[str]]] = {}  # chain at the child's event, the siblings it needs
    named: dict[tuple[str, str], str | None] = {}  # which child an id of a node's stands for
    round_of: dict[str, list[str]] = defaultdict(list)  # children declared in the node's phase
    for event in events:
        node, kind = event["node"], event["event"]
        if kind == "start":
            after, needs = declared.get(node, (0, []))
            base[node] = max([after, *(chain[n] for n in needs)])
            first[node], chain[node] = event["tokens"], base[node]
        elif kind == "resume":
            base[node] = max([chain[node], *(chain[child] for child in round_of.pop(node, []))])
            first[node] = event["tokens"]
        elif kind in ("event", "malformed", "pause", "concluded"):
            if node in first:
                chain[node] = max(chain[node], base[node] + event["tokens"] - first[node])
            if kind == "event" and event["kind"] == "child":
                stands = event["child"] or event["same_as"]  # None: refused
                named[node, event["id"]] = stands
                if event["child"]:
                    before = (named.get((node, name)) for name in event["depends_on"])
                    declared[stands] = (chain[node], [path for path in before if path])
                if stands:
                    round_of[node].append(stands)
    return sum(chain.get(name, 0) for name in ("root", "root!direct"))
