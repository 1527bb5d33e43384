"""The embedded model's tasks, tokenizer and transcripts, without the model."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from embedded import families, transcripts
from embedded.benchmark import benchmark_tasks, record
from embedded.data import KINDS, NODE_WEIGHTS, collate, cut_batches, encode, node_weights, sample_transcript
from embedded.evaluate import Node, final_value
from embedded.tokenizer import build_tokenizer
from embedded.wording import random_task
from transformers import PreTrainedTokenizerFast

from rrm_engine.protocol.style import load_style

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def tasks(count: int, *, held_out: bool = False, seed: int = 5) -> list[families.Task]:
    rng = random.Random(seed)
    return [random_task(rng, kind, held_out=held_out) for _ in range(count) for kind in KINDS]


def recomputed(text: str, known: dict[str, int]) -> int:
    """Value of a canonical task, computed from its text alone and by other means than the generator's."""
    if text.startswith("sum "):
        return sum(recomputed(inner, known) for inner in text[4:].split("; ")) % 1000
    family, start, *middle, rounds = text.split()
    value = int(start) if start.isdigit() else known[start]
    count = int(rounds[1:])
    if family == "grow":
        factor, addend = int(middle[0][1:]), int(middle[1][1:])
        return (value * factor**count + addend * sum(factor**i for i in range(count))) % 1000
    if family == "mult":
        return value * pow(int(middle[0][1:]), count, 1000) % 1000
    fibonacci = [0, 1]
    while len(fibonacci) < count + 2:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    return (fibonacci[count] * value + fibonacci[count + 1] * int(middle[0])) % 1000


def test_tasks_follow_from_the_seed() -> None:
    assert tasks(5) == tasks(5)
    assert tasks(5) != tasks(5, seed=6)


def test_answers_agree_with_an_independent_computation() -> None:
    for task in tasks(40):
        known: dict[str, int] = {}
        for part in task.parts:
            known[part.id] = recomputed(part.canonical(), known)
        assert task.answer() == sum(known.values()) % 1000


def test_problem_states_every_number() -> None:
    for task in tasks(20):
        numbers = Counter(re.findall(r"\d+", task.problem))
        for part in task.parts:
            for leaf in part.leaves:
                stated = [leaf.start] if isinstance(leaf.start, int) else []
                assert {str(n) for n in (*stated, *leaf.numbers, leaf.rounds)} <= numbers.keys()


def test_training_never_draws_from_the_reserved_class() -> None:
    for task in tasks(30):
        assert not any(leaf.reserved() for part in task.parts for leaf in part.leaves)
    for task in tasks(10, held_out=True):
        assert all(leaf.reserved() for part in task.parts for leaf in part.leaves)


def test_shipped_benchmark_is_what_the_generator_makes() -> None:
    lines = (ROOT / "rrm_engine" / "data" / "embedded_tasks.jsonl").read_text().splitlines()
    made = list(benchmark_tasks(seed=1))
    assert [json.loads(line) for line in lines] == [record(task, i) for i, task in enumerate(made)]
    assert all(leaf.reserved() for task in made for part in task.parts for leaf in part.leaves)
    kinds = Counter(task.kind for task in made)
    assert kinds["depends"] >= 8 and kinds["nested"] >= 8 and kinds["atomic"] >= 6
    assert {task.width for task in made if task.kind == "flat"} == set(range(2, 9))


def test_digit_helpers() -> None:
    assert families.add_digits(978, 45) == "13120"
    assert families.multiply_digits(204, 8, 4, 3) == "36036"
    for x, y in ((0, 0), (999, 999), (978, 45), (5, 95)):
        digits = families.add_digits(x, y)
        assert int((digits[1] + digits[3] + digits[4])[::-1]) == (x + y) % 1000
        digits = families.multiply_digits(x, 7, 3, 3)
        assert int((digits[1] + digits[3] + digits[4])[::-1]) == (7 * x + 3) % 1000


def test_scratchpad_ends_in_the_result() -> None:
    for task in tasks(20):
        for part in task.parts:
            for leaf in part.leaves:
                last = leaf.scratchpad(204).splitlines()[-1]
                assert last.startswith("00:")
                assert last[-4] + last[-2:] == families.reversed_digits(leaf.result(204))


def test_vocabulary_and_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) < 600
    assert tokenizer.eos_token == "<|im_end|>"
    assert all(len(tokenizer.encode(digit, add_special_tokens=False)) == 1 for digit in "0123456789")


def test_every_text_round_trips(tokenizer: PreTrainedTokenizerFast) -> None:
    samples = ["Grüße, 世界 🙂\tend", " The theory \n\n grow grow x9", '{"type":"child","id":"a"} "}"} "]}', ""]
    for text in [*samples, *(task.problem for task in tasks(5))]:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_incremental_decoding_gives_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    from tokenizers.decoders import DecodeStream

    text = 'Zoë has 204 世界🙂 at first\n{"type":"await","children":["Z","é"],"rule":"sum"}'
    stream = DecodeStream(skip_special_tokens=False)
    pieces = [
        stream.step(tokenizer.backend_tokenizer, token) or ""
        for token in tokenizer.encode(text, add_special_tokens=False)
    ]
    assert "".join(pieces) == text


def test_pieces_encode_like_the_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    for task in tasks(8):
        for transcript in transcripts.task_transcripts(task):
            ids, learn = encode(tokenizer, transcript)
            assert ids == tokenizer.encode(transcript.text, add_special_tokens=False)
            assert len(ids) == len(learn) and len(ids) <= 1200
            assert tokenizer.decode(ids) == transcript.text


def test_an_event_ends_with_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    """No token reaches beyond the brace that closes an event."""
    for task in tasks(4):
        for transcript in transcripts.task_transcripts(task)[1:]:
            ids, _ = encode(tokenizer, transcript)
            assert all("}" not in tokenizer.decode([token])[:-1] for token in ids)


def test_prompts_are_chatml_of_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    style = load_style("embedded")
    for mode, prompt in (
        ("direct", transcripts.direct_prompt("task")),
        ("recursive", transcripts.graph_prompt("task", {})),
    ):
        messages = [{"role": "system", "content": style.system(mode)}, {"role": "user", "content": "task"}]
        assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == prompt
    given = transcripts.graph_prompt("grow A *4 +1 x9", {"A": 204})
    assert "<|im_start|>user\ngrow A *4 +1 x9\nA = 204<|im_end|>\n<|im_start|>assistant\n" in given


def test_recursive_nodes_share_two_blocks(tokenizer: PreTrainedTokenizerFast) -> None:
    prefix = transcripts.graph_prompt("", {}).removesuffix("<|im_end|>\n<|im_start|>assistant\n")
    assert 34 <= len(tokenizer.encode(prefix, add_special_tokens=False)) <= 60


def test_forks_declare_the_parts(tokenizer: PreTrainedTokenizerFast) -> None:
    for task in tasks(10):
        if task.kind == "atomic":
            continue
        prompt, fork, resume, rest = transcripts.root_transcript(task).pieces
        *children, awaited = [json.loads(line) for line in fork[0].split("\n")]
        assert [child["id"] for child in children] == [part.id for part in task.parts]
        assert [child["task"] for child in children] == [part.canonical() for part in task.parts]
        assert [child.get("depends_on", []) for child in children] == [
            [part.depends_on] if part.depends_on else [] for part in task.parts
        ]
        assert awaited == {"type": "await", "children": [part.id for part in task.parts], "rule": "sum"}
        assert [trained for _, trained in (prompt, fork, resume, rest)] == [False, True, False, True]
        assert all(f"{name} = {value}" in resume[0] for name, value in task.results().items())
        assert final_value(rest[0]) == task.answer()


def test_every_transcript_concludes_with_its_result() -> None:
    for task in tasks(10):
        direct, root, *_ = transcripts.task_transcripts(task)
        assert direct.pieces[-1][0].endswith(f"FINAL: {task.answer()}<|im_end|>")
        assert root.pieces[-1][0].endswith(f'{{"type":"atomic","answer":"FINAL: {task.answer()}"}}<|im_end|>')
        for part in task.parts:
            if len(part.leaves) > 1:
                group = transcripts.group_transcript(part)
                assert final_value(group.text) == task.results()[part.id]


def test_batches_hold_every_token_once(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(3)
    rows = [encode(tokenizer, sample_transcript(rng, 0.5, NODE_WEIGHTS)) for _ in range(30)]
    batches = cut_batches(rows, 2048, tokenizer.pad_token_id)
    assert sum(len(batch.ids) for batch in batches) == 30
    assert all(batch.tokens <= 2048 for batch in batches)
    assert sum(int(batch.learn.sum()) for batch in batches) == sum(sum(learn) for _, learn in rows)
    single = collate(rows[:1], tokenizer.pad_token_id)
    assert single.ids[0].tolist() == rows[0][0]


def test_critical_path_of_a_dependent_child() -> None:
    root = Node("root", "", 0, fork=[0] * 40, last=[0] * 10)
    first, second = Node("A", "", 1, parent=root), Node("B", "", 1, depends_on=("A",), parent=root)
    first.last, second.last = [0] * 100, [0] * 50
    root.children, root.offsets = [first, second], [15, 30]
    assert root.finish_time() == 15 + 100 + 50 + 10


def test_other_shares_of_leaves_leave_the_rest_in_proportion() -> None:
    assert node_weights(NODE_WEIGHTS["leaf"]) == NODE_WEIGHTS
    weights = node_weights(0.3)
    assert weights["leaf"] == 0.3 and abs(sum(weights.values()) - 1) < 1e-12
    assert abs(weights["direct"] / weights["root"] - NODE_WEIGHTS["direct"] / NODE_WEIGHTS["root"]) < 1e-12
