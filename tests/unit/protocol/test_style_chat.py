"""Prompt styles and their errors; chat turns cut out of real chat templates."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rrm_engine.errors import RrmError
from rrm_engine.graph.types import Conclusion, Phase
from rrm_engine.protocol.chat import ChatFormat
from rrm_engine.protocol.parser import EventParser
from rrm_engine.protocol.repair import QUOTES
from rrm_engine.protocol.style import USER, VARIABLES, default_style, load_style, style_names

CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)

MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    "{{- bos_token }}{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
    "{%- if loop.last and system_message is defined %}"
    "{{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}{%- else %}"
    "{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}{%- else %}"
    "{{- ' ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}"
)

# As published for Qwen3, without the parts for tools.
QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
            {%- set reasoning_content = message.content.split('</think>')[0].rstrip('\n').split('<think>')[-1] %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content + '\n</think>\n\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""

ALWAYS_THINKS = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")


def tokenizer(template: str | None, eos: str, *special: str, bos: str | None = None) -> PreTrainedTokenizerFast:
    """One id a byte, beside the special tokens, which come first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    names = dict.fromkeys([eos, *([bos] if bos else []), *special])
    core.add_special_tokens([AddedToken(name, special=True) for name in names])
    core.add_tokens([AddedToken(name) for name in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, bos_token=bos, chat_template=template)


def chatml(template: str = CHATML) -> PreTrainedTokenizerFast:
    return tokenizer(template, "<|im_end|>", "<|im_start|>")


FAMILIES = {
    "chatml": chatml,
    "llama3": lambda: tokenizer(
        LLAMA3, "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", bos="<|begin_of_text|>"
    ),
    "gemma": lambda: tokenizer(GEMMA, "<eos>", "<start_of_turn>", "<end_of_turn>", bos="<bos>"),
    "mistral": lambda: tokenizer(MISTRAL, "</s>", "[INST]", "[/INST]", bos="<s>"),
    "qwen3": lambda: chatml(QWEN3),
}


def rendered(tok: PreTrainedTokenizerFast, messages: list[tuple[str, str]], **switches: Any) -> list[int]:
    text = tok.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        tokenize=False,
        add_generation_prompt=True,
        **switches,
    )
    return list(tok.encode(text, add_special_tokens=False))


ANSWER = '{"type":"await","children":["c1"],"rule":"é"}'


@pytest.mark.parametrize("family", FAMILIES)
def test_opening_reply_and_turn_are_the_whole_conversation(family: str) -> None:
    tok = FAMILIES[family]()
    chat = ChatFormat(tok)
    reply = (" " if family == "mistral" else "") + ANSWER
    ids = chat.opening("", "first", thinking=True) + tok.encode(reply, add_special_tokens=False)
    ids += chat.turn("second", thinking=True)
    assert ids == rendered(tok, [("user", "first"), ("assistant", ANSWER), ("user", "second")])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_a_turn_stands_once(family: str) -> None:
    tok = FAMILIES[family]()
    closing = tok.convert_tokens_to_ids("<end_of_turn>") if family == "gemma" else tok.eos_token_id
    chat = ChatFormat(tok, [closing])
    assert {closing, tok.eos_token_id} == chat.eos_ids
    assert chat.closes_with(closing) and chat.turn("u")[0] == closing
    assert chat.turn("u", closed=True) == chat.turn("u")[1:]
    assert not chat.closes_with(tok.convert_tokens_to_ids("<think>"))


@pytest.mark.parametrize("family", FAMILIES)
def test_system_text_is_always_there_once(family: str) -> None:
    tok = FAMILIES[family]()
    chat = ChatFormat(tok)
    assert chat.has_system_role == (family != "gemma")
    if chat.has_system_role:
        assert chat.opening("sys", "user") == rendered(
            tok, [("system", "sys"), ("user", "user")], enable_thinking=False
        )
    else:
        assert chat.opening("sys", "user") == rendered(tok, [("user", "sys\n\nuser")])
    assert "sys" not in tok.decode(chat.turn("user"))


def test_same_system_text_is_a_shared_prefix() -> None:
    chat = ChatFormat(FAMILIES["qwen3"]())
    system = load_style("qwen3").system("recursive")
    a, b = chat.opening(system, "task A", thinking=False), chat.opening(system, "other", thinking=True)
    shared = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    assert shared > len(chat.tokenizer.encode(system))


def test_thinking_switch_of_qwen3() -> None:
    tok = FAMILIES["qwen3"]()
    chat = ChatFormat(tok)
    assert chat.has_thinking
    assert tok.decode(chat.turn("u", thinking=False)).endswith("assistant\n<think>\n\n</think>\n\n")
    assert tok.decode(chat.turn("u", thinking=True)).endswith("assistant\n")
    assert not chat.opens_thinking(True) and not chat.opens_thinking(False)
    assert "<think>" not in tok.decode(chat.turn("u", thinking=True))


def test_earlier_thinking_is_kept_in_place() -> None:
    """The template would drop the first turn's thinking; appended turns leave those ids alone."""
    tok = FAMILIES["qwen3"]()
    chat = ChatFormat(tok)
    written = tok.encode("<think>\nhm\n</think>\n\n" + ANSWER, add_special_tokens=False)
    ids = chat.opening("s", "first", thinking=True) + written + chat.turn("second", thinking=True)
    whole = rendered(tok, [("system", "s"), ("user", "first"), ("assistant", "X"), ("user", "second")])
    assert "hm" in tok.decode(ids)
    assert tok.decode(ids).replace("<think>\nhm\n</think>\n\n" + ANSWER, "X") == tok.decode(whole)


def test_template_that_always_opens_thinking() -> None:
    chat = ChatFormat(chatml(ALWAYS_THINKS))
    assert chat.has_thinking and chat.opens_thinking(True) and chat.opens_thinking(False)
    assert not ChatFormat(chatml()).has_thinking


def test_plain_format_without_a_template() -> None:
    tok = tokenizer(None, "</s>", bos="<s>")
    chat = ChatFormat(tok)
    assert chat.plain and not chat.has_thinking
    assert tok.decode(chat.opening("sys", "hi")) == "<s>sys\n\nUser: hi\n\nAssistant:"
    assert tok.decode(chat.opening("", "hi")) == "<s>User: hi\n\nAssistant:"
    assert tok.decode(chat.turn("more")) == "\n\nUser: more\n\nAssistant:"


# ---- styles


@pytest.mark.parametrize("name", ["qwen3", "instruct", "by-reference"])
def test_packaged_style(name: str) -> None:
    style = load_style(name)
    assert style.name == name and not style.trained_on_events
    assert all(style.budget(phase) >= 256 and not style.thinks(Phase.GRAPH) for phase in Phase)
    assert style.budget(Phase.GRAPH) == style.budgets["planner"]
    conclusions = [Conclusion("c1", "long talk FINAL: 12"), Conclusion("c2", "", ok=False, task="PART")]
    values: dict[str, Any] = {
        "task": "TASK",
        "problem": "",
        "given": conclusions[:1],
        "conclusions": conclusions,
        "notes": ["NOTE"],
        "rule": "RULE",
        "id": "c7",
        "max_width": 5,
        "depth_left": 1,
    }

    def user(kind: str, **changes: Any) -> str:
        return style.user(kind, **{name: {**values, **changes}[name] for name in VARIABLES[kind]})

    texts = {kind: user(kind) for kind in USER}
    for kind in ("direct", "graph", "solver", "fork"):
        assert "TASK" in texts[kind]
    for kind in ("direct", "graph", "solver", "fork"):
        assert "- c1: 12" in texts[kind]
    for kind in ("direct", "solver", "solve"):
        assert "FINAL:" in texts[kind]
    assert "2 to 5" in texts["graph"]
    assert re.search(r"\nc1 = 12\nc2 = not found, it is: PART\n\nNote: NOTE\n\n.*: TASK\n.*: RULE\n", texts["resume"])
    resume = {name: values[name] for name in VARIABLES["resume"]}
    assert style.opens("resume", **resume) == "First c2, PART" and "work out yourself" in texts["resume"].lower()
    whole = {**resume, "conclusions": conclusions[:1], "rule": "c1 + 1"}
    assert style.opens("resume", **whole) == "c1 + 1 = 12 + 1 =" and "yourself" not in style.user("resume", **whole)
    wordy = [Conclusion("c1", "FINAL: 3"), Conclusion("c2", "FINAL: Al had 3 hats before the 2 new ones")]
    assert style.opens("resume", **{**resume, "conclusions": wordy}) == "RULE with c1 = 3, c2 ="
    assert texts["solver"] == texts["direct"]
    assert "Results that are known" not in user("solver", given=())
    assert "\n\n\n" not in "".join(texts.values())
    leaf = user("fork", depth_left=0)
    assert "FINAL:" in leaf and "atomic" not in leaf


PIECE = re.compile(r"[^\r\n\w]?[^\W\d]+|\d| ?[^\s\w]+[\r\n]*|\s*[\r\n]+|\s+")


@pytest.mark.parametrize("name", ["qwen3", "instruct", "by-reference"])
def test_instructions_for_planning_are_short(name: str) -> None:
    """At most 500 tokens of Qwen's, chat markup included: these are 1.07 times the pieces its tokenizer cuts first."""
    system, user, _ = load_style(name).start("graph", task="", problem="", given=(), max_width=8, depth_left=1)
    assert 300 < len(PIECE.findall(f"{system}\n{user}")) <= 455


@pytest.mark.parametrize("name", ["qwen3", "instruct", "by-reference"])
def test_examples_in_the_system_text_are_events(name: str) -> None:
    """A model copies what it is shown: every example must be read without a repair."""
    lines = [line for line in load_style(name).system("recursive").splitlines() if line.startswith("{")]
    assert len(lines) >= 9
    for line in lines:
        parser = EventParser()
        (found,) = parser.feed(line)
        assert found.end == len(line) and not parser.repairs
    assert not re.search(f"[{QUOTES[2:]}]", load_style(name).system("recursive"))


def test_sampling_is_left_to_the_model_unless_the_style_says() -> None:
    qwen = load_style("qwen3")
    assert qwen.sampling(True) == {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0}
    assert qwen.sampling(False) == {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0}
    assert load_style("instruct").sampling(True) == {}


def test_default_style() -> None:
    assert default_style("qwen3", "embedded") == "embedded"
    assert default_style("qwen3", "Qwen/Qwen3-14B") == default_style("qwen3_moe", "x") == "qwen3"
    assert default_style("llama", "x") == "by-reference"


OWN = (Path(__file__).parents[3] / "rrm_engine/protocol/styles/instruct.toml").read_text()


def own(tmp_path: Path, old: str = "", new: str = "") -> Path:
    assert old in OWN
    path = tmp_path / "own.toml"
    path.write_text(OWN.replace(old, new, 1))
    return path


def test_own_style_by_path(tmp_path: Path) -> None:
    assert load_style(own(tmp_path, 'name = "instruct"', 'name = "mine"')).name == "mine"


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("planner = 1024", "", "budgets.planner is missing"),
        ("planner = 1024", "planner = 1024\nsolver = 0", "budgets.solver must be at least 1"),
        ("planner = 1024", "planner = 'many'", "budgets.planner must be a whole number"),
        ("planner = 1024", "planner = 1024\nleaf = 3", "unknown key budgets.leaf"),
        ("[user]", "[user]\nsolver = 'x'", "budgets.solver is missing"),
        ("max_depth = 1", "max_depth = -1", "max_depth must be at least 0"),
        ("max_depth = 1", "max_depth = true", "max_depth must be a whole number"),
        ("max_depth = 1", "max_task_chars = 0", "max_task_chars must be at least 1"),
        ("counts_parts = true", "counts_parts = 1", "counts_parts must be true or false"),
        ("max_depth = 1", "child_context = 'both'", "child_context must be task or parent"),
        ("[opens]", "[opens]\ngraph = 'x'", "unknown key opens.graph; known are direct, resume, solve, fork"),
        ("[opens]", "[opens]\nsolver = 'x'", "unknown key opens.solver"),
        ("[opens]", "[opens]\ndirect = '{{ rule }}'", "opens.direct uses rule; it may use task, problem, given"),
        ("trained_on_events = false", "", "trained_on_events is missing"),
        ("[user]", "[user]\nextra = 'x'", "unknown key user.extra"),
        ("[budgets]", "[sampling.plain]\ntemperature = 'hot'\n[budgets]", "sampling.plain.temperature"),
        ("[budgets]", "[budgets", "not valid TOML"),
        ("{{ task }}", "{{ tusk }}", "user.direct uses tusk; it may use task, problem, given"),
        ("{{ task }}", "{{ task ", "user.direct: "),
        ("{{ task }}", "{% if depth_left > 99 %}{{ tusk }}{% endif %}", "user.direct uses tusk"),
        ("{{ part.final", "{{ part.finale", "user.direct: "),
        ("{{ task }}", "{{ 1 // depth_left }}", "user.direct: integer division or modulo by zero"),
        ("{{ task }}", "{{ given[0].final }}", "user.direct: list object has no element 0"),
        ("{{ task }}", "{% for i in range(999999999) %}x{% endfor %}", "user.direct: Range too big"),
        ("{{ task }}", "{% include 'x' %}", "user.direct: "),
        ("You write the", "{{ task }}", "system.recursive uses task; it may use finish"),
        ("finish =", "finished =", "user.direct uses finish; it may use task, problem, given"),
        ("finish =", "rule = 'x'\nfinish =", "phrases.rule: templates are given another rule"),
        ("finish =", "extra = 3\nfinish =", "phrases.extra must be a text"),
    ],
)
def test_broken_style_is_refused_by_name(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    path = own(tmp_path, old, new)
    with pytest.raises(ValueError, match=re.escape(complaint)) as error:
        load_style(path)
    assert str(path) in str(error.value)


def write(folder: Path, **styles: str) -> Path:
    """Styles by file name; the path of the first."""
    for name, text in styles.items():
        (folder / f"{name}.toml").write_text(text)
    return folder / f"{next(iter(styles))}.toml"


NAMED = 'name = "mine"\ndescription = "d"\n'


def test_a_style_changes_single_keys_of_its_base(tmp_path: Path) -> None:
    path = write(tmp_path, mine=f'base = "qwen3"\n{NAMED}[budgets]\nsolver = 7\n[phrases]\nfinish = "The end: {{{{"')
    mine, qwen = load_style(path), load_style("qwen3")
    assert (mine.name, mine.description) == ("mine", "d")
    assert mine.budgets == {**qwen.budgets, "solver": 7} and mine.thinking == qwen.thinking
    assert mine.sampling(True) == qwen.sampling(True)
    assert mine.system("recursive") == qwen.system("recursive")
    assert mine.user("solve", **dict.fromkeys(VARIABLES["solve"], ())).splitlines()[0].endswith("The end: {{")


def test_bases_are_found_from_the_file_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    path = write(tmp_path, mine=f'base = "deep/other.toml"\n{NAMED}')
    write(tmp_path / "deep", other=f'base = "third.toml"\n{NAMED}[budgets]\nsolver = 7')
    write(tmp_path / "deep", third=f'base = "instruct"\n{NAMED}[budgets]\nsolver = 8\ndirect = 9')
    style = load_style(path)
    assert style.budgets == {"direct": 9, "planner": 1024, "solver": 7, "continuation": 1536}


@pytest.mark.parametrize(
    ("styles", "complaint"),
    [
        (
            {"a": 'base = "b.toml"', "b": 'base = "./a.toml"'},
            r"a\.toml builds on itself: \S*a.toml -> b.toml -> ./a.toml",
        ),
        ({"a": 'base = "a.toml"'}, "a.toml -> a.toml"),
        (
            {"a": 'base = "nonesuch"'},
            r"no prompt style 'nonesuch' \(the base of \S*a\.toml\); there are by-reference, ",
        ),
        ({"a": 'base = "b.toml"', "b": 'base = ""'}, r"no prompt style '' \(the base of b\.toml\)"),
        ({"a": 'base = "b.toml"'}, r"prompt style b\.toml \(the base of \S*a\.toml\) cannot be read: "),
        ({"a": 'base = "b.toml"', "b": "["}, r"prompt style b\.toml \(the base of \S*a\.toml\) is not valid TOML"),
        ({"a": "base = 3"}, r"prompt style \S*a\.toml: base must be a text"),
        ({"a": 'base = "instruct"'}, r"a\.toml: name is missing"),
        ({"a": f'base = "instruct"\n{NAMED}thinking = 3'}, r"a\.toml: thinking must be a table"),
        ({"a": f'base = "instruct"\n{NAMED}[user]\nfirk = ""'}, r"a\.toml: unknown key user\.firk"),
    ],
)
def test_a_base_that_cannot_be_used_is_refused_in_one_sentence(
    tmp_path: Path, styles: dict[str, str], complaint: str
) -> None:
    with pytest.raises(RrmError, match=complaint) as error:
        load_style(write(tmp_path, **styles))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [kind for kind in USER if kind != "solver"])
def test_a_template_may_use_what_its_kind_gets_and_nothing_else(tmp_path: Path, kind: str) -> None:
    everything = sorted({name for names in VARIABLES.values() for name in names})
    for name in everything:
        data = tomllib.loads(OWN)
        data["user"][kind] += f"{{{{ {name} }}}}"
        path = tmp_path / "own.toml"
        path.write_text(OWN[: OWN.index("[user]")] + "\n".join(["[user]", *_lines(data["user"])]))
        if name in VARIABLES[kind]:
            load_style(path)
        else:
            known = ", ".join(VARIABLES[kind])
            with pytest.raises(RrmError, match=rf"user\.{kind} uses {name}; it may use {known}"):
                load_style(path)


def _lines(table: dict[str, str]) -> list[str]:
    return [f"{key} = {json.dumps(text)}" for key, text in table.items()]


def test_unknown_style_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there are .*instruct.*qwen3"):
        load_style("nonesuch")
    with pytest.raises(ValueError, match="cannot be read"):
        load_style(tmp_path / "nonesuch.toml")
    assert {"instruct", "qwen3"} <= set(style_names())


def test_missing_value_and_unknown_kind_are_refused() -> None:
    style = load_style("instruct")
    with pytest.raises(ValueError, match="user text graph takes task, problem, given"):
        style.user("graph", max_width=2, depth_left=1)
    with pytest.raises(ValueError, match="no user text 'plan'"):
        style.user("plan")
    with pytest.raises(ValueError, match="no system text 'rrm'"):
        style.system("rrm")
