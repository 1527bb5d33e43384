"""What a text gives as its answer, and what must not be taken for one."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from searched import searched

from rrm_engine.protocol.answers import MOST_SENTENCES, in_brief, read_answer

REASONING = (
    "First we add 3 and 4, which gives 7. Then 7 * 5 = 35, so one part is done.\n"
    "The second part has 12 pieces, and half of them are red.\n"
)
STATED = [
    "FINAL: {}", "Final: {}", "**Final:** {}", "**Answer:** {}", "Answer: {}.", "The answer is {}.", r"\boxed{{{}}}",
    "The final answer is {}.", "So the answer is **{}**.", "**The answer is therefore {}.**", "The answer to it is: {}",
    "## Final Answer\n{}", "### Answer: {}", r"Hence we get \boxed{{{}}} of them.", "FINAL: The answer is {}.",
    "The correct answer is ${}$.", "The answer we look for is {}", "The answer is {} because nothing else is left.",
    "The answer is {}.\nIt follows from what was counted above.",
]  # fmt: skip
ENDINGS = [
    "{}", "**{}**", "x = {}", "Total: {}", "3 + 4 + 5 = {}", "So there are {} apples.", "$$\nx = {}\n$$", "It is {}.",
    "Therefore, the total is **{}**.", "\\[ {} \\]", "Thus $n = {}$.", "James has {} dollars.", "= {}",
]  # fmt: skip
FALSE_ALARMS = [
    "The answer is not 5.", "The answer isn't 5.", "Is the answer 5?", "If the answer is 5, then n is even.",
    "The answer is 5. Wait, one case is missing, so we go on.", "Suppose the answer is 5.",
    "The answer is the sum of all.",
    "Answer the following: 5 apples", "To answer this we note that 5 is odd here", "FINAL: <answer>", "FINAL: ...",
    "End with one last line that holds only the answer:\nFINAL: <answer>", "For example, FINAL: 5", "> The answer is 5",
    "> FINAL and more", 'He says "the answer is 5" and leaves.', "The answer is in the form m/n.",
    "The answer is correct.",
    "Give the final answer as a fraction.", "Answer:\nLet us compute the sum first.", "- 3\n- 5", "1. 4\n2. 5",
    "There are 5 more than before.", "We still have to show that n divides it.", "```\nprint(5)\n```", "Step 5",
    "Problem 5: How many are there?", "Each of the 5 children has some.", "so x = 5 if y is odd",
    "5 is not the answer.",
    'What is 2 + 3?\n{"type":"done"}', "Let x = 5 be the first one.", "Find: 5 apples", "", "\n",
]  # fmt: skip
ANSWERS = st.one_of(st.integers(-99, 10_000).map(str), st.sampled_from(["1/2", "3.5", "1,234"]))


@searched(150)
@given(ANSWERS, st.sampled_from(STATED + ENDINGS), st.booleans())
def test_answers_as_models_write_them(answer: str, form: str, reasoned: bool) -> None:
    read = read_answer(REASONING * reasoned + form.format(answer))
    assert read is not None and re.sub(r" (apples|dollars)$", "", read) == answer


@pytest.mark.parametrize("ending", FALSE_ALARMS)
def test_what_is_no_answer(ending: str) -> None:
    assert read_answer(ending) is None
    assert read_answer(REASONING + ending) is None or not ending.strip()
    assert read_answer(f"{REASONING}{ending}\nFINAL: 8") == "8"


@searched(100)
@given(st.sampled_from([f for f in STATED if "because" not in f]), st.sampled_from(FALSE_ALARMS))
def test_a_stated_answer_is_found_after_false_alarms(form: str, alarm: str) -> None:
    if "Wait" not in alarm:
        assert read_answer(f"{alarm}\n\n{REASONING}{form.format(8)}") == "8"


@pytest.mark.parametrize(
    "value", ["Tuesday", "yes", "No", "(B)", "x^2 + 1", "the set {1, 2}", "Alice and Bob", "a", "(1, 2)"]
)
def test_words_and_formulas_may_be_answers(value: str) -> None:
    assert read_answer(f"{REASONING}The answer is {value}.") == value


PIECES = st.sampled_from(
    [*STATED, *ENDINGS, *FALSE_ALARMS, REASONING, " ", "\n", "word " * 200, "x" * 900, ". ", "$", "{"]
)
TEXTS = st.lists(st.one_of(PIECES, st.text(max_size=20)), max_size=8).map("".join)


@searched(400)
@given(TEXTS)
@example("word " * 300)
@example("FINAL: 5 " + "and " * 300)
def test_a_text_in_brief_says_the_same_in_few_words(text: str) -> None:
    brief, answer = in_brief(text), read_answer(text.strip())
    if answer is not None:
        assert read_answer(brief) == answer
        assert brief == text.strip() or brief == f"FINAL: {answer}"
    else:
        assert brief in text and len(brief) <= 400
        assert bool(brief) == bool(text.strip())


def test_a_long_text_is_told_by_its_answer_or_its_last_sentences() -> None:
    assert in_brief("It is odd. FINAL: 5") == "It is odd. FINAL: 5"
    assert in_brief(REASONING + "The answer is 5.") == "FINAL: 5"
    long = REASONING * 20 + "Nothing else can be said about it. It may be that no such number exists at all."
    assert in_brief(long) == "Nothing else can be said about it. It may be that no such number exists at all."
    assert MOST_SENTENCES == 2
