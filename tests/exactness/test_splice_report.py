"""The report on attached KV: it equals plain transformers with and without it, and disturbs nothing it reports on."""

import itertools
from collections import Counter
from typing import Any

import broken
import pytest
import torch
from lab import JOBS, Lab, Recorded, idle, recorded
from transformers import DynamicCache
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from rrm_engine.backends.shadow import Shadows
from rrm_engine.engine.engine import Engine
from rrm_engine.engine.sequence import Sequence
from rrm_engine.kv import cache as kv_cache
from rrm_engine.kv.span import Span


def reports(run: Recorded) -> list[dict[str, Any]]:
    return [report for result in run.results.values() for report in result.splice_report]


# what it says


class Attached:
    """Notes from where every span came and where it went."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.spans: dict[Span, tuple[str, int]] = {}  # source, start
        self.places: dict[str, dict[int, tuple[Span, str, int]]] = {}  # by sequence and position
        keep, attached = Engine.keep, Sequence.attached

        def noting_keep(engine: Engine, keeper: Sequence, source: Sequence, start: int, stop: int) -> Span:
            span = keep(engine, keeper, source, start, stop)
            self.spans[span] = (source.key, start)
            return span

        def noting_attached(sequence: Sequence, span: Span, position: int) -> None:
            self.places.setdefault(sequence.key, {})[position] = (span, *self.spans[span])
            attached(sequence, span, position)

        monkeypatch.setattr(Engine, "keep", noting_keep)
        monkeypatch.setattr(Sequence, "attached", noting_attached)

    @torch.inference_mode()
    def recompute(self, plain: Any, run: Recorded, key: str) -> tuple[DynamicCache, torch.Tensor]:
        """Plain transformers on a node's transcript, its children's KV attached by hand: cache, logits by token.

        Rotating a key once more by some distance gives the key of the position that much later.
        """
        tokens, cache, at = run.ends()[key]["token_ids"], DynamicCache(), 0
        logits = torch.zeros(len(tokens), plain.config.vocab_size)
        places = self.places.get(key, {})
        for position in [*sorted(places), len(tokens)]:
            if position > at:
                out = plain(input_ids=torch.tensor([tokens[at:position]]), past_key_values=cache, use_cache=True)
                logits[at:position], at = out.logits[0], position
            if position in places:
                span, source, start = places[position]
                given, _ = self.recompute(plain, run, source)
                cos, sin = plain.model.rotary_emb(logits, torch.full((1, len(span)), position - start))
                for index, layer in enumerate(given.layers):
                    keys, values = (kv[:, :, start : start + len(span)] for kv in (layer.keys, layer.values))
                    cache.update(apply_rotary_pos_emb(keys, keys, cos, sin)[0], values, index)
                at = position + len(span)
        return cache, logits

    @torch.inference_mode()
    def differences(self, plain: Any, run: Recorded, key: str, limit: int) -> list[tuple[list[float], list[bool]]]:
        """After every resume of a node with a span: by token the KL divergence and whether the likeliest agree."""
        end, found = run.ends()[key], []
        tokens, (_, attached) = end["token_ids"], self.recompute(plain, run, key)
        text = plain(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        for (_, before), (first, stop) in itertools.pairwise(end["sampled"]):
            if any(before <= position < first for position in self.places.get(key, ())):
                rows = slice(first - 1, min(stop, first + limit) - 1)
                p, q = text[rows].log_softmax(-1), attached[rows].log_softmax(-1)
                found.append(((p.exp() * (p - q)).sum(-1).tolist(), (p.argmax(-1) == q.argmax(-1)).tolist()))
        return found


def as_reported(kl: list[float], same: list[bool]) -> dict[str, Any]:
    return {
        "tokens": len(kl),
        "kl_mean": pytest.approx(sum(kl) / len(kl), abs=1e-4, rel=1e-3),
        "kl_max": pytest.approx(max(kl), abs=1e-4, rel=1e-3),
        "top1": pytest.approx(sum(same) / len(same)),
        "first_difference": same.index(False) if False in same else None,
    }


def check_reports(lab: Lab, join: str, limit: int, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Counter[str]:
    """Every report against plain transformers; how often what was seen."""
    attached, seen = Attached(monkeypatch), Counter[str]()
    run = recorded(lab, join=join, splice_report=limit, **changes)
    for key, end in run.ends().items():
        expected = attached.differences(lab.plain, run, key, limit)
        assert len(end["splice_report"]) == len(expected), key
        seen["resumes"] += len(expected)
        seen["several awaits"] += len(expected) > 1
        for report, (kl, same) in zip(end["splice_report"], expected, strict=True):
            assert report.pop("node") == end["node"]
            tokens = report["tokens"]
            assert tokens <= min(limit, len(kl) + 1)  # the last one of a phase is cut off where an event ends in it
            if tokens <= len(kl):
                assert report == as_reported(kl[:tokens], same[:tokens]), key
                seen["equal"] += 1
                seen["early end"] += tokens == len(kl) < limit
                seen["late"] += tokens < len(kl)
                seen["differing"] += report["first_difference"] is not None
    assert len(reports(run)) == seen["resumes"]
    return seen


@pytest.mark.parametrize(
    ("join", "limit", "changes"),
    [
        ("splice", 1, {}),
        ("splice", 16, {"seed": 2}),
        ("transcript", 16, {"seed": 8}),
        ("transcript", 30, {"seed": 7, "wait_policy": "offload", "block_size": 4, "kv_blocks": 1600}),
        ("splice", 1000, {"child_context": "parent", "prefix_cache": False, "step_tokens": 200}),
    ],
)
def test_reports_are_those_of_plain_transformers(
    lab: Lab, join: str, limit: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after several awaits, and where a node ends or pauses before it has written that many tokens."""
    seen = check_reports(lab, join, limit, monkeypatch, **changes)
    assert seen["equal"] > 5 and seen["several awaits"]
    assert limit == 1 or seen["early end"]
    assert seen["differing"] or limit == 1 or "child_context" in changes  # in its parent's context KV fits better
    assert bool(seen["late"]) == ("step_tokens" in changes)  # the shadow has more to prefill than a step has room for


def test_a_shadow_that_goes_its_own_way_is_noticed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the shadow's own tokens instead of the node's."""
    broken.shadows_lead_themselves(monkeypatch)
    with pytest.raises(AssertionError, match="kl_mean"):
        check_reports(lab, "splice", 16, monkeypatch)


def test_a_wrong_attachment_is_noticed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: keys left where they were."""
    monkeypatch.setattr(kv_cache, "rerotate", lambda keys, delta, inv_freq: keys)
    with pytest.raises(AssertionError, match="kl_mean"):
        check_reports(lab, "transcript", 16, monkeypatch)


# what it leaves alone


def counted(run: Recorded) -> dict[str, tuple[int, ...]]:
    """What rows say about tokens and blocks."""
    names = ("total_tokens", "forward_prefilled", "forward_decoded", "reused", "forked_blocks", "copied_blocks")
    more = ("peak_kv_blocks", "preemptions", "offloaded_blocks", "restored_blocks", "spliced_tokens", "model_calls")
    return {key: tuple(getattr(r, name) for name in (*names, *more)) for key, r in run.results.items()}


@pytest.mark.parametrize(("join", "policy"), [("splice", "pin"), ("transcript", "offload"), ("transcript", "drop")])
def test_the_report_disturbs_nothing(lab: Lab, join: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing is evicted.
    settings: dict[str, Any] = {"join": join, "wait_policy": policy, "block_size": 4, "kv_blocks": 9000}
    off, on = (recorded(lab, splice_report=tokens, **settings) for tokens in (0, 40))
    assert on.rows() == off.rows()
    assert counted(on) == counted(off)
    assert on.solver.engine.steps == off.solver.engine.steps
    assert reports(on) and not reports(off)
    monkeypatch.setattr(Shadows, "blocks", property(lambda self: 0))  # control: its blocks counted as the row's
    assert counted(recorded(lab, splice_report=40, **settings)) != counted(off)


def test_a_cancelled_node_reports_what_it_has(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after the fifth token of a resume: five are in the report, and every block is free."""
    solver, on_token = lab.solver(join="transcript"), Shadows.on_token
    events: list[dict[str, Any]] = []

    def interrupting(self: Shadows, sampled: Any) -> bool:
        of_shadow = on_token(self, sampled)
        if any(len(shadow.kl) == 5 for shadow in self._live):
            monkeypatch.setattr(Shadows, "on_token", on_token)
            raise KeyboardInterrupt
        return of_shadow

    monkeypatch.setattr(Shadows, "on_token", interrupting)
    with pytest.raises(KeyboardInterrupt):
        list(solver.run(JOBS, events.append))
    cut = [report for event in events for report in event.get("splice_report", ()) if event["event"] == "cancelled"]
    assert [report["tokens"] for report in cut] == [5]
    assert idle(solver)
