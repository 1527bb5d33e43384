"""Every setting of a run, once: the frozen config of the Python API and the source of the command line's flags."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from rrm_engine.errors import RrmError

MODES = ("direct", "rrm")
TYPES = {
    tuple[str, ...]: "names",
    bool: "on or off (True or False)",
    int: "a whole number",
    float: "a number",
    str: "a text",
}
SERVERS_ONLY = ("base_urls", "api_key_env", "tokenizer", "continue_by", "request_timeout")
IN_PROCESS_ONLY = (
    *("dtype", "device", "devices", "placement", "attention", "lookahead", "eager", "trust_remote_code"),
    *("generation_config", "block_size", "kv_blocks", "step_tokens", "wait_policy", "host_kv_blocks", "prefix_cache"),
    *("draft", "join", "boundary_tokens", "splice_report"),
)
Attention = Literal["native", "triton", "varlen", "flash", "sdpa"]
Placement = Literal["single", "pipeline", "replicate"]
WaitPolicy = Literal["pin", "offload", "drop", "lru", "auto"]
Join = Literal["text", "splice", "transcript"]
ChildContext = Literal["task", "parent"]


def setting(default: Any, group: str, help: str, **extra: Any) -> Any:
    """A dataclass field that also carries what the command line needs: group, help, choices, metavar."""
    return field(default=default, metadata={"group": group, "help": help, **extra})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Settings of a run. ``None`` means "decided from the model or the prompt style at load".

    Raises RrmError, naming the flag, when a value is out of range or of another type. A path will do for a text, and a
    list for a tuple.
    """

    # model
    model: str = setting(
        "embedded",
        "model",
        "embedded, a hub id, a local directory, a GGUF file, or random weights to measure with: random:Qwen3-14B ...",
    )
    dtype: str = setting(
        "auto",
        "model",
        "weights and KV cache; auto: fp32 for the embedded model, else the checkpoint's own",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    device: str = setting("auto", "model", "auto, cpu, cuda, cuda:0 ...")
    devices: str | None = setting(
        None, "model", "instead of --device: several, as in cuda:0,cuda:1; one may be named more than once"
    )
    placement: str = setting(
        "auto",
        "model",
        "of the model on --devices: pipeline, its layers in turn; replicate, a copy on each; single, on the first; "
        "auto: single if it fits there with room for KV, else pipeline",
        choices=("auto", *get_args(Placement)),
    )
    attention: str = setting(
        "auto",
        "model",
        "native: compiled, CPU; triton: CUDA; varlen: torch's FlashAttention, flash: the flash-attn package, both CUDA "
        "and --block-size 256; sdpa: torch reference, any device; auto: native or triton where they are, else sdpa",
        choices=("auto", *get_args(Attention)),
    )
    lookahead: str = setting(
        "auto",
        "model",
        "launch a step before the tokens of the one before are read, so that the host works while the device computes; "
        "auto: on CUDA",
        choices=("auto", "on", "off"),
    )
    draft: str = setting(
        "auto",
        "model",
        "guess a node's next tokens from its own context and its grammar, up to N, and check them in one step; what "
        "nodes write is the same; auto: as many as are likely to save time on this machine, none on CUDA so far",
        metavar="{auto,off,N}",
    )
    eager: bool = setting(False, "model", "on CUDA launch kernels one by one instead of replaying CUDA graphs")
    trust_remote_code: bool = setting(
        False, "model", "run the Python code that a checkpoint brings for its model or tokenizer; read it first"
    )
    prompt_style: str = setting("auto", "model", "a packaged style's name or a TOML file; auto: by model")

    # backend and servers
    backend: str = setting(
        "local",
        "servers",
        "local: the engine in this process; openai: servers with the OpenAI API, such as vLLM or SGLang; responses: "
        "servers with the OpenAI Responses API",
        choices=("local", "openai", "responses"),
    )
    base_urls: tuple[str, ...] = setting(
        (), "servers", "comma-separated replicas, as in http://127.0.0.1:18000/v1", metavar="URLS"
    )
    api_key_env: str | None = setting(
        None, "servers", "environment variable that holds the servers' API key", metavar="VAR"
    )
    tokenizer: str | None = setting(
        None, "servers", "hub id or directory of the model's own tokenizer; default: --model", metavar="NAME"
    )
    continue_by: str = setting(
        "auto",
        "servers",
        "how a node goes on: tokens, all its token ids are sent, so that the server finds them in its prefix cache; "
        "turn, its conversation is; auto: tokens where the server returns token ids",
        choices=("auto", "tokens", "turn"),
    )
    request_timeout: float = setting(
        600.0, "servers", "seconds without anything from a replica after which it is asked again", metavar="S"
    )

    # what to run
    modes: tuple[str, ...] = setting(MODES, "run", "comma-separated: direct, rrm")
    samples: int = setting(1, "run", "samples per task and mode")
    seed: int = setting(0, "run", "seed of the keyed sampling noise")
    limit: int | None = setting(None, "run", "only the first N tasks")
    shard: str | None = setting(
        None, "run", "only a share of the tasks: of N shares the I-th, counted from 1", metavar="I/N"
    )
    max_row_tokens: int | None = setting(None, "run", "tokens of all nodes of a row: there it ends with what it has")
    max_row_seconds: float | None = setting(None, "run", "seconds of a row: there it ends with what it has")
    task_concurrency: int = setting(1, "run", "tasks in flight at once; 1 measures latency undisturbed")
    max_concurrency: int = setting(64, "run", "sequences decoding at once")

    # graph
    max_depth: int | None = setting(None, "graph", "levels of children below the root; default: the style's")
    max_sibling_width: int = setting(8, "graph", "children one node may start")
    max_nodes: int = setting(64, "graph", "nodes of one graph")
    child_context: str | None = setting(
        None,
        "graph",
        "what a child starts from: its task only, or a fork of its parent's whole context; default: the style's",
        choices=get_args(ChildContext),
    )
    constrain: str = setting(
        "auto",
        "graph",
        "grammar for the graph and continuation phases; auto: on unless the style's model was trained on the events",
        choices=("auto", "on", "off"),
    )

    # budgets, thinking
    direct_max_tokens: int | None = setting(None, "phases", "tokens of a direct solve")
    planner_max_tokens: int | None = setting(None, "phases", "tokens of a graph phase")
    solver_max_tokens: int | None = setting(None, "phases", "tokens of a solver phase")
    continuation_max_tokens: int | None = setting(None, "phases", "tokens after each resume")
    direct_thinking: bool | None = setting(None, "phases", "thinking in direct solves")
    graph_thinking: bool | None = setting(None, "phases", "thinking in graph phases")
    solver_thinking: bool | None = setting(None, "phases", "thinking in solver phases")
    continuation_thinking: bool | None = setting(None, "phases", "thinking in continuations")

    # sampling
    temperature: float | None = setting(None, "sampling", "0 is greedy; default: the style, else the model's own")
    top_p: float | None = setting(None, "sampling", "nucleus probability")
    top_k: int | None = setting(None, "sampling", "0 is off; default: as above, else transformers' own, which is 50")
    min_p: float | None = setting(None, "sampling", "least probability relative to the likeliest token")
    repetition_penalty: float | None = setting(
        None,
        "sampling",
        "of tokens that stand in the node's transcript already, 1 is off; rests where a grammar holds",
    )
    generation_config: str = setting(
        "honour",
        "sampling",
        "what the checkpoint's generation_config says about sampling: honour it as transformers' generate does, or "
        "ignore all but its end-of-sequence tokens",
        choices=("honour", "ignore"),
    )

    # memory
    block_size: int = setting(16, "memory", "tokens of a KV block")
    kv_blocks: int | None = setting(None, "memory", "blocks in the pool; default: from the memory there is")
    max_sequence_tokens: int | None = setting(
        None, "memory", "longest sequence; default: longest prompt and budgets, up to the model's own limit"
    )
    step_tokens: int | None = setting(None, "memory", "token budget of one step (chunked prefill); default by device")
    wait_policy: str = setting(
        "pin",
        "memory",
        "KV of a node that awaits: pin keeps it; offload moves it to host memory and back; drop recomputes it; lru "
        "leaves it to the prefix cache; auto pins it and, out of blocks, takes the cheaper of offload and drop",
        choices=get_args(WaitPolicy),
    )
    host_kv_blocks: int | None = setting(
        None, "memory", "room for offloaded blocks in host memory; default: as many as in the pool, if they fit"
    )
    prefix_cache: bool = setting(True, "memory", "reuse equal prompt prefixes across sequences")
    join: str = setting(
        "text",
        "memory",
        "how conclusions reach their parent: text, prefilled; splice attaches the KV of the conclusion's tokens, "
        "transcript that of the child's whole answer, both an approximation",
        choices=get_args(Join),
    )
    boundary_tokens: int = setting(0, "memory", "first tokens of every attached span that are computed again")
    splice_report: int = setting(
        16,
        "memory",
        "tokens after each splice whose distributions are compared with those after the text; costs time; 0: none",
    )

    def __post_init__(self) -> None:
        _check_types(self)
        checks = [
            (
                self.device == "auto" or self.devices is None,
                "--device and --devices both say where to run: give only one of them",
            ),
            (
                self.devices is not None or self.placement in ("auto", "single"),
                f"--placement {self.placement} needs --devices, for example --devices cuda:0,cuda:1",
            ),
            (
                self.draft in ("auto", "off") or (self.draft.isdecimal() and int(self.draft) >= 1),
                "--draft takes auto, off, or the most tokens to draft, at least 1",
            ),
            *self._of_servers(),
            (self.samples >= 1, "--samples must be at least 1"),
            (self.task_concurrency >= 1, "--task-concurrency must be at least 1"),
            (self.max_concurrency >= 1, "--max-concurrency must be at least 1"),
            (self.max_depth is None or self.max_depth >= 0, "--max-depth must be at least 0"),
            (self.max_sibling_width >= 1, "--max-sibling-width must be at least 1"),
            (self.max_nodes >= 1, "--max-nodes must be at least 1"),
            (self.block_size >= 1, "--block-size must be at least 1"),
            (self.splice_report >= 0, "--splice-report must be at least 0"),
            (self.limit is None or self.limit >= 1, "--limit must be at least 1"),
            (self.shard is None or _is_share(self.shard), "--shard takes I/N, as in 2/4: the second of four shares"),
            (self.max_row_seconds is None or self.max_row_seconds > 0, "--max-row-seconds must be above 0"),
            (self.temperature is None or self.temperature >= 0, "--temperature must not be negative"),
            (self.top_p is None or 0 < self.top_p <= 1, "--top-p must be in (0, 1]"),
            (self.top_k is None or self.top_k >= 0, "--top-k must not be negative"),
            (self.min_p is None or 0 <= self.min_p < 1, "--min-p must be in [0, 1)"),
            (self.repetition_penalty is None or self.repetition_penalty > 0, "--repetition-penalty must be above 0"),
            (bool(self.modes) and set(self.modes) <= set(MODES), f"--modes takes {', '.join(MODES)}"),
            (len(set(self.modes)) == len(self.modes), f"--modes {','.join(self.modes)} names a mode twice"),
        ]
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name.endswith(("_max_tokens", "kv_blocks", "_tokens")) and value is not None:
                least = 0 if f.name == "boundary_tokens" else 1
                checks.append((value >= least, f"--{f.name.replace('_', '-')} must be at least {least}"))
            if choices := f.metadata.get("choices"):
                checks.append(
                    (value is None or value in choices, f"--{f.name.replace('_', '-')} takes {', '.join(choices)}")
                )
        for ok, message in checks:
            if not ok:
                raise RrmError(message)

    def _of_servers(self) -> Iterator[tuple[bool, str]]:
        """What may be asked of servers, and what only of them: whether it is so, and what is said if it is not."""
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        by = f"--backend {self.backend}"
        yield self.request_timeout > 0, "--request-timeout must be above 0"
        if self.backend == "local":
            for name in changed:
                yield name not in SERVERS_ONLY, f"{_flag(name)} is for servers: give --backend openai or responses too"
            return
        yield bool(self.base_urls), f"{by} needs --base-urls, for example --base-urls http://127.0.0.1:18000/v1"
        for name in changed:
            yield name not in IN_PROCESS_ONLY, f"{_flag(name)} is for the engine in this process, not for {by}"
        yield self.backend == "openai" or self.continue_by != "tokens", f"{by} has no token ids: --continue-by turn"
        for url in self.base_urls:
            yield (
                _is_plain(url),
                (
                    "--base-urls takes http:// or https:// addresses without user, key or query: put a key into an "
                    "environment variable and name that with --api-key-env"
                ),
            )
        yield len(set(self.base_urls)) == len(self.base_urls), "--base-urls names a replica twice"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved(RunConfig):
    """Settings as a run uses them: what a `RunConfig` may leave open, and is the same for every backend, is decided.

    Made from one that was checked, so only types are checked again: None and "auto" are none of them.
    """

    prompt_style: str
    max_depth: int
    child_context: ChildContext
    constrain: Literal["on", "off"]
    direct_max_tokens: int
    planner_max_tokens: int
    solver_max_tokens: int
    continuation_max_tokens: int
    direct_thinking: bool
    graph_thinking: bool
    solver_thinking: bool
    continuation_thinking: bool

    def __post_init__(self) -> None:
        _check_types(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(Resolved):
    """The same for the engine in this process.

    ``device`` is where the model's layers begin. What ``auto`` of ``wait_policy`` and of ``draft`` means is decided
    while a run goes on, from measured costs.
    """

    dtype: str
    device: str
    placement: Placement
    attention: Attention
    lookahead: Literal["on", "off"]
    step_tokens: int
    max_sequence_tokens: int
    kv_blocks: int
    host_kv_blocks: int
    wait_policy: WaitPolicy
    join: Join


@dataclass(frozen=True, slots=True, kw_only=True)
class ServersConfig(Resolved):
    """The same for servers. ``max_sequence_tokens`` is None where they do not say how much they take."""

    continue_by: Literal["tokens", "turn"]


def _check_types(config: RunConfig) -> None:
    """Give every setting the type of its field. Raises RrmError."""
    for name, hint in get_type_hints(type(config)).items():
        object.__setattr__(config, name, _typed(name, getattr(config, name), hint))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _is_plain(url: str) -> bool:
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        return False
    return known and "@" not in parts.netloc and not parts.query and not parts.fragment


def _is_share(text: str) -> bool:
    share, slash, shares = text.partition("/")
    numbers = share.isascii() and share.isdecimal() and shares.isascii() and shares.isdecimal()
    return bool(slash) and numbers and 1 <= int(share) <= int(shares)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """``value`` as its field's type wants it. Raises RrmError, naming the flag, for one of another type."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise RrmError(f"{_flag(name)} takes {', '.join(get_args(hint))}, not {value!r}")
        return value
    kinds = get_args(hint) or (hint,)
    if isinstance(value, os.PathLike) and str in kinds:
        value = os.fspath(value)
    if isinstance(value, list) and hint == tuple[str, ...]:
        value = tuple(value)
    if hint == tuple[str, ...]:
        good = isinstance(value, tuple) and all(isinstance(one, str) for one in value)
    elif float in kinds:
        good = (type(value) is not bool and isinstance(value, int | float) and math.isfinite(value)) or (
            value is None and type(None) in kinds
        )
    else:
        good = type(value) in kinds
    if not good:
        what = next(words for kind, words in TYPES.items() if kind in kinds or hint == kind)
        raise RrmError(f"--{name.replace('_', '-')} takes {what}, not {value!r}")
    return value
