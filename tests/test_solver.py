"""Whole recursive runs on the in-process backend, with real forwards of a tiny random model.

Under the event grammar even a random model writes valid graphs: random splits, dependencies, depths and failures.
Every sampled token must be the one that plain transformers, the same grammar and the same keyed noise give on that
node's own transcript, and no setting of memory or batching may change a single token.
"""

import copy
import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import rrm_engine
from rrm_engine.backends.local import Solver
from rrm_engine.backends.result import Job, JobResult
from rrm_engine.config import RunConfig
from rrm_engine.engine.prepare import LoadedModel, load_model, prepare_model
from rrm_engine.engine.sampler import sample
from rrm_engine.engine.sequence import Sequence

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STYLE = """
name = "terse"
description = "For tests: as short as a style can be."
trained_on_events = false

[thinking]
direct = false
graph = false
solver = false
continuation = false

[budgets]
direct = 24
planner = 120
solver = 24
continuation = 90

[system]
direct = "Solve."
recursive = "Split or solve. Write events."

[user]
direct = "{{ task }}"
graph = "Problem: {{ task }}{% for p in given %} {{ p.id }}={{ p.final }}{% endfor %} Split?"
solver = "Problem: {{ task }}{% for p in given %} {{ p.id }}={{ p.final }}{% endfor %} Solve!"
resume = "{% for c in conclusions %}{{ c.id }}={{ c.final }} {% endfor %}{% for n in notes %}{{ n }} {% endfor %}Go on."
solve = "Now solve it."
fork = "You are {{ id }}: {{ task }}{% for p in given %} {{ p.id }}={{ p.final }}{% endfor %} {{ depth_left }}"
"""
# What the tokenizer is trained on. Merges may cross anything, so that events end in the middle of tokens.
WRITING = """{"type":"child","id":"c1","task":"a","depends_on":[]}
{"type":"child","id":"c2","task":"b","depends_on":["c1"]}
{"type":"child","id":"c3","task":"c","depends_on":["c1","c2"]}
{"type":"await","children":["c1","c2","c3"],"rule":"r"}
{"type":"atomic","answer":"FINAL: 7"}
{"type":"done"}
{"type":"atomic"}
FINAL: 1 FINAL: x FINAL: -2 "FINAL: (nFINAL: aaFINAL: bxFINAL: c.FINAL: q;FINAL: y
Problem: the Split? Solve! Go on. Now solve it. You are Split or solve. Write events."""
# Leanings of the model, by text: without them it would hardly ever close a string.
LEANINGS = {'{"': 9.0, '"': 7.0, "FINAL": 6.0, "<|im_end|>": 7.0, "c": -1.5}
VOCABULARY = 400
TASKS = ["Add 2 and 3.", "How many days?", "x", "Find the remainder of 7 by 4, twice."]
JOBS = [Job(f"t{i}", task) for i, task in enumerate(TASKS)]
SETTINGS: dict[str, Any] = {
    "constrain": "on",
    "temperature": 1.0,
    "seed": 2,
    "max_depth": 2,
    "max_sibling_width": 3,
    "max_nodes": 500,  # never reached: which nodes a limit hits depends on who declares first
    "kv_blocks": 400,
    "max_sequence_tokens": 800,
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
        max_token_length=12,
    )
    tokenizer.train_from_iterator([WRITING] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML
    )


def make_plain() -> Any:
    """A tiny random Qwen3, fp32, whose hidden states share a constant direction that carries the leanings."""
    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        initializer_range=0.15,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    torch.manual_seed(3)
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding[:, 0] = 3.0
        constant = float(model.model(input_ids=torch.arange(50)[None]).last_hidden_state[0, :, 0].mean())
        head[:, 0] = 0.0
        for token in range(len(tokenizer)):
            text = tokenizer.decode([token])
            head[token, 0] = next((v for k, v in LEANINGS.items() if text.startswith(k)), 0.0) / constant
    return model


@dataclass
class Lab:
    """What all tests share: the model, plain and prepared, and the style."""

    plain: Any
    model: LoadedModel
    style: Path

    def solver(self, **changes: Any) -> Solver:
        return Solver(self.model, RunConfig(prompt_style=str(self.style), **{**SETTINGS, **changes}), TASKS)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    style = tmp_path_factory.mktemp("style") / "terse.toml"
    style.write_text(STYLE)
    plain = make_plain()
    return Lab(plain, prepare_model(copy.deepcopy(plain), make_tokenizer(), "tiny"), style)


@dataclass
class Recorded:
    """A run with its events, and for each sequence what it was told to sample with, phase by phase."""

    solver: Solver
    results: dict[str, JobResult] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    phases: dict[str, list[SimpleNamespace]] = field(default_factory=lambda: defaultdict(list))

    def run(self, jobs: list[Job], concurrency: int) -> "Recorded":
        engine = self.solver.engine
        submit, resume = engine.submit, engine.resume

        def note(sequence: Sequence, fresh: Any) -> None:
            phase = SimpleNamespace(sampling=sequence.sampling, noise_key=sequence.noise_key, matcher=fresh)
            self.phases[sequence.key].append(phase)

        def watched_submit(*args: Any, **kwargs: Any) -> Sequence:
            sequence = submit(*args, **kwargs)
            note(sequence, sequence.matcher and sequence.matcher.copy())  # type: ignore[attr-defined]
            return sequence

        def watched_resume(sequence: Sequence, *args: Any) -> None:
            resume(sequence, *args)
            note(sequence, sequence.matcher and sequence.matcher.copy())  # type: ignore[attr-defined]

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
                if sample(logits[i - 1 : i].clone(), [place]) != [tokens[i]]:  # type: ignore[list-item]
                    wrong[key].append(i)
                if matcher is not None:
                    matcher.accept(tokens[i])
    return dict(wrong)


@pytest.fixture(scope="module")
def reference(lab: Lab) -> Recorded:
    """Plenty of everything."""
    return recorded(lab)


@pytest.fixture(scope="module")
def forked_reference(lab: Lab) -> Recorded:
    return recorded(lab, child_context="parent")


# exactness


def test_a_random_model_under_the_grammar_lives_through_every_kind_of_graph(reference: Recorded) -> None:
    """What the tests below rest on: depth, failures, dependencies, several rounds, and budgets that run out."""
    statuses = {str(r.status) for r in reference.results.values()}
    assert {"graph", "fallback"} <= statuses
    assert max(r.max_depth for r in reference.results.values()) == 2
    assert any(e.get("depends_on") for e in reference.events)
    assert any("eos" in e["reason"] for e in reference.events if e["event"] == "pause")
    assert any("length" in e["reason"] for e in reference.events if e["event"] == "pause")
    assert max(len(e["sampled"]) for e in reference.ends().values()) >= 3
    assert {e["ok"] for e in reference.events if e["event"] == "concluded"} == {True, False}


def test_every_sampled_token_equals_plain_transformers(lab: Lab, reference: Recorded) -> None:
    assert wrong_tokens(lab.plain, reference) == {}
    assert sum(b - a for e in reference.ends().values() for a, b in e["sampled"]) > 1000


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.0},
        {"temperature": 1.3, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
        {"kv_blocks": 200, "block_size": 4, "step_tokens": 5, "max_concurrency": 3, "seed": 9},
    ],
    ids=["greedy", "nucleus", "small pool"],
)
def test_exact_under_other_settings(lab: Lab, changes: dict[str, Any]) -> None:
    assert wrong_tokens(lab.plain, recorded(lab, **changes)) == {}


def test_a_wrong_seed_is_noticed(lab: Lab, reference: Recorded) -> None:
    """Negative control: with other noise the oracle disagrees."""
    other = Recorded(reference.solver, events=reference.events)
    for key, phases in reference.phases.items():
        other.phases[key] = [SimpleNamespace(**{**vars(p), "noise_key": p.noise_key + 1}) for p in phases]
    assert len(wrong_tokens(lab.plain, other)) > 5


def test_a_missing_copy_is_noticed(lab: Lab) -> None:
    """Negative control: a fork that writes into its parent's block changes tokens."""
    run = Recorded(lab.solver(child_context="parent"))
    run.solver.engine.runner.cache.copy = lambda copies: None  # type: ignore[method-assign]
    assert wrong_tokens(lab.plain, run.run(JOBS, 4)) != {}


# nothing about memory or batching changes a token

SMALLEST = 50  # blocks of 16 for one sequence of 800 tokens
SAME: dict[str, dict[str, Any]] = {
    "one node at a time": {"max_concurrency": 1},
    "one task at a time": {"concurrency": 1},
    "smallest pool": {"kv_blocks": SMALLEST},
    "small steps": {"step_tokens": 8},
    "no prefix cache": {"prefix_cache": False},
    "small blocks": {"block_size": 4, "kv_blocks": 4 * SMALLEST},
    **{policy: {"wait_policy": policy} for policy in ("offload", "drop", "lru")},
    "auto in the smallest pool": {"wait_policy": "auto", "kv_blocks": SMALLEST},
    "offload in the smallest pool": {"wait_policy": "offload", "kv_blocks": SMALLEST, "host_kv_blocks": 20},
    "all of it": {
        "max_concurrency": 3,
        "kv_blocks": 4 * SMALLEST,
        "block_size": 4,
        "step_tokens": 8,
        "prefix_cache": False,
    },
}


@pytest.mark.parametrize("name", SAME)
def test_same_rows_and_tokens(lab: Lab, reference: Recorded, name: str) -> None:
    run = recorded(lab, **SAME[name])
    assert run.rows() == reference.rows()
    if name.startswith("offload"):
        assert sum(r.restored_blocks for r in run.results.values()) > 0
    if name == "smallest pool":
        assert sum(r.preemptions for r in run.results.values()) > 0
        assert sum(r.preemptions for r in reference.results.values()) == 0


def test_a_seed_changes_the_rows(lab: Lab, reference: Recorded) -> None:
    """Negative control of the test above."""
    assert recorded(lab, seed=SETTINGS["seed"] + 1).rows() != reference.rows()


# forks


def test_children_that_start_from_their_parents_context(lab: Lab, forked_reference: Recorded) -> None:
    run = forked_reference
    assert wrong_tokens(lab.plain, run) == {}
    split = [r for r in run.results.values() if r.nodes > 2]
    assert split
    assert all(r.forked_blocks > 0 and r.copied_blocks > 0 for r in split)
    tight = recorded(lab, child_context="parent", kv_blocks=SMALLEST, max_concurrency=3)
    assert tight.rows() == run.rows()


def test_a_forked_child_reads_its_parents_text_up_to_its_own_event(lab: Lab, forked_reference: Recorded) -> None:
    decode = lab.model.tokenizer.decode
    ends = forked_reference.ends()
    children = 0
    for event in forked_reference.events:
        if event["event"] != "event" or event["kind"] != "child":
            continue
        key = f"{event['job']}:{event['node']}"
        if (child := ends.get(f"{key}.{event['id']}")) is None:
            continue
        texts = [decode(end["token_ids"]) for end in (ends[key], child)]
        differs = next(i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b)
        shared, rest = texts[1][:differs].rstrip("\n"), texts[1][differs:]
        last = json.loads(shared[shared.rindex('{"type":"child"') :])
        assert (last["id"], last["task"].strip()) == (event["id"], event["task"])
        assert rest.startswith(f"<|im_end|>\n<|im_start|>user\nYou are {event['id']}:")
        children += 1
    assert children > 5


# cancellation and errors


def idle(solver: Solver) -> bool:
    solver.engine.check()
    return solver.engine.pool.num_used == 0 and not solver.engine.has_work and not solver.engine.scheduler.paused


def test_closing_a_stream_in_the_middle_frees_everything(lab: Lab, reference: Recorded) -> None:
    solver = lab.solver()
    for task in TASKS:
        stream = solver.stream(task)
        if any(event.get("node", "").count(".") == 2 for event in stream):  # a grandchild has started
            break
    assert solver.engine.pool.num_used > 0
    stream.close()  # type: ignore[attr-defined]
    assert idle(solver)
    again = Recorded(solver).run(JOBS, 4)
    assert again.rows() == reference.rows()


def test_closing_a_run_cancels_the_other_jobs(lab: Lab) -> None:
    solver = lab.solver()
    events: list[dict[str, Any]] = []
    results = solver.run(JOBS, events.append, concurrency=4)
    next(results)
    assert not idle(solver)
    results.close()  # type: ignore[attr-defined]
    assert idle(solver)
    assert sum(e["event"] == "finish" for e in events) == 4
    assert any(e["event"] == "cancelled" and e["reason"] == "cancelled" for e in events)


@pytest.mark.parametrize("kind", ["start", "resume", "concluded", "event", "pause"])
def test_an_interrupt_at_any_event_frees_everything(lab: Lab, kind: str) -> None:
    """As by Ctrl-C or a full disk while events are written."""
    solver = lab.solver()
    seen = Counter[str]()

    def interrupt(event: dict[str, Any]) -> None:
        seen[event["event"]] += 1
        if event["event"] == kind and seen[kind] == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(solver.run(JOBS, interrupt, concurrency=4))
    assert idle(solver)


def test_an_error_in_a_step_fails_the_jobs_in_flight_only(
    lab: Lab, reference: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    solver = lab.solver()
    runner, calls = solver.engine.runner, 0
    run = runner.run

    def failing(step: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 60:
            raise RuntimeError("the device is gone")
        return run(step)

    monkeypatch.setattr(runner, "run", failing)
    events: list[dict[str, Any]] = []
    results = {r.job.id: r for r in solver.run(JOBS, events.append, concurrency=2)}
    broken = {k: r for k, r in results.items() if r.error}
    assert len(broken) == 2
    assert {str(r.status) for r in broken.values()} == {"failed"}
    assert all(re.fullmatch(r"RuntimeError in a step of .+: the device is gone", r.error) for r in broken.values())  # type: ignore[arg-type]
    for job in JOBS:
        if job.id not in broken:
            assert results[job.id].answer == reference.results[job.key].answer
    assert idle(solver)
    again = Recorded(solver).run(JOBS, 4)
    assert again.rows() == reference.rows()


def test_a_prompt_that_does_not_fit_gets_an_error_with_the_numbers(lab: Lab, reference: Recorded) -> None:
    solver = lab.solver()
    long = Job("long", "very " * 500)
    direct = Job("long", "very " * 500, "direct")
    results = {r.job.key: r for r in solver.run([long, JOBS[0], direct], concurrency=2)}
    for job in (long, direct):
        result = results[job.key]
        assert result.status in ("failed", "invalid")
        assert result.error is not None
        assert re.search(r"has \d{4} tokens and a sequence may have 800: raise --max-sequence-tokens", result.error)
    assert results[JOBS[0].key].answer == reference.results[JOBS[0].key].answer
    assert idle(solver)


# events


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
                parent = node + "."
                declared[parent + event["id"]] = (chain[node], [parent + name for name in event["depends_on"]])
                round_of[node].append(parent + event["id"])
    return sum(chain.get(name, 0) for name in ("root", "root!direct"))


# the embedded model: what it was trained for is not of interest here, only that it is run exactly

FOLDER = Path(rrm_engine.__file__).parent / "data"
embedded_model = pytest.mark.skipif(
    not (FOLDER / "embedded_model" / "config.json").is_file(), reason="the embedded model is not packaged yet"
)


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, LoadedModel, list[Job]]:
    """The packaged model, plain and prepared, and one packaged task of each kind."""
    plain = AutoModelForCausalLM.from_pretrained(FOLDER / "embedded_model", dtype=torch.float32)
    tasks: dict[str, str] = {}
    for line in (FOLDER / "embedded_tasks.jsonl").read_text().splitlines():
        tasks.setdefault(json.loads(line)["kind"], json.loads(line)["problem"])
    jobs = [Job(kind, problem) for kind, problem in tasks.items()]
    return plain.eval(), load_model("embedded"), [*jobs, Job("alone", jobs[0].task, "direct")]


def run_embedded(model: LoadedModel, jobs: list[Job], concurrency: int = 5, **changes: Any) -> Recorded:
    solver = Solver(model, RunConfig(**changes), [job.task for job in jobs])
    return Recorded(solver).run(jobs, concurrency)


HOT = {"temperature": 1.0, "constrain": "on", "planner_max_tokens": 150, "continuation_max_tokens": 60}
HOT |= {"solver_max_tokens": 60, "direct_max_tokens": 60}


@embedded_model
@pytest.mark.parametrize("changes", [{}, HOT, {"child_context": "parent"}], ids=["as is", "hot", "fork"])
def test_the_embedded_model_is_run_exactly(
    embedded: tuple[Any, LoadedModel, list[Job]], changes: dict[str, Any]
) -> None:
    plain, model, jobs = embedded
    run = run_embedded(model, jobs, **changes)
    assert wrong_tokens(plain, run) == {}
    assert len(run.results) == 5
    assert sum(b - a for e in run.ends().values() for a, b in e["sampled"]) > 500


@embedded_model
def test_the_embedded_models_rows_do_not_depend_on_memory_or_batching(
    embedded: tuple[Any, LoadedModel, list[Job]],
) -> None:
    _, model, (*jobs, _) = embedded
    plenty = run_embedded(model, jobs)
    longest = max(len(end["token_ids"]) for end in plenty.ends().values()) + 1
    blocks = -(-longest // 16)
    tight = run_embedded(model, jobs, max_sequence_tokens=longest, kv_blocks=blocks, step_tokens=24)
    assert tight.rows() == plenty.rows()
    assert sum(r.preemptions for r in tight.results.values()) > 0
    one_by_one = run_embedded(model, jobs[:2], concurrency=1, max_concurrency=1, prefix_cache=False)
    assert one_by_one.rows().items() <= plenty.rows().items()
    assert len(one_by_one.rows()) > 6
