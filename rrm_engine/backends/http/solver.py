"""Solvers over servers: found, asked what they can do, and described for the run directory."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import httpx2
import openai

from rrm_engine.backends.http.backend import HttpBackend, Streams
from rrm_engine.backends.http.context import Contexts, TokenContexts, TurnContexts
from rrm_engine.backends.http.pool import Pool, Replica
from rrm_engine.backends.http.probe import (
    find_models,
    keeps_to,
    patient,
    prompt_tokens,
    refused,
    returned_ids,
    takes,
)
from rrm_engine.backends.http.session import Asking
from rrm_engine.backends.http.settings import additions, phase_plans, refuse_ignored, resolve
from rrm_engine.backends.http.tokenizer import ModelFiles, read_model_files
from rrm_engine.backends.http.transport import Transport
from rrm_engine.backends.http.wire import GOING_ON, Api, ChatApi, ResponsesApi, TokenApi
from rrm_engine.backends.solving import Solving
from rrm_engine.config import Resolved, RunConfig
from rrm_engine.errors import RrmError
from rrm_engine.protocol.chat import ChatFormat
from rrm_engine.protocol.grammar import event_grammar
from rrm_engine.protocol.style import Style, default_style, load_style
from rrm_engine.solver.outcome import BUDGETS

CONNECT_TIMEOUT_S = 10.0
ASKED = "Say yes."  # the task of the requests that find out what a server takes


@dataclass(slots=True)
class Servers:
    """What was found out. ``more`` is what every request has besides its phase's settings."""

    api: Api
    contexts: Contexts
    taken: frozenset[str] = frozenset()
    refused: dict[str, str] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    grammar: bool = False
    without_grammar: str = ""  # why
    opens: bool = True  # answers can be made to begin with a text
    without_opens: str = ""  # why


class HttpSolver(Solving):
    """Solves tasks over servers that hold one model. ``resolved`` is the config with what was left open filled in."""

    backend: HttpBackend

    def __init__(self, config: RunConfig, announce: Callable[[str], None]) -> None:
        """Raises RrmError if a server does not answer, or cannot do what was asked for."""
        self._secret = _api_key(config)
        self._transport = Transport()
        try:
            self._begin(config, announce)
        except BaseException:
            self._transport.close()
            raise

    def _begin(self, config: RunConfig, announce: Callable[[str], None]) -> None:
        transport, replicas = self._transport, _replicas(config, self._secret)
        announce(f"Asking {len(replicas)} of {config.backend}'s API what they serve ...")
        found = transport.wait(find_models(replicas))
        files = self._files(config, replicas[0])
        name = config.prompt_style
        kind = files.model_type if files else _kind(config.model)
        style = load_style(default_style(kind, config.model) if name == "auto" else name)
        chat = ChatFormat(files.tokenizer, files.eos_ids) if files else None
        self.resolved = used = resolve(config, style, chat, found.longest)
        self.servers = servers = transport.wait(_ask(replicas[0], used, style, chat))
        refuse_ignored(config, servers.refused)
        plans = phase_plans(
            used, style, servers.contexts.marks, servers.taken, grammar=servers.grammar, more=servers.more
        )
        http = httpx2.AsyncClient(headers=_headers(self._secret))
        pool = Pool(replicas, config.max_concurrency, http)
        transport.start(pool.watch())
        streams = Streams(transport, pool, servers.api, config.model)
        asking = Asking(
            servers.contexts,
            plans,
            streams,
            used.seed,
            used.max_sequence_tokens,
            used.continue_by,
            self._secret,
            servers.opens,
        )
        self.backend = HttpBackend(asking, streams)
        super().__init__(self.backend, style, used)

    @classmethod
    def load(
        cls, config: RunConfig, tasks: Sequence[str] = (), announce: Callable[[str], None] = lambda _: None
    ) -> "HttpSolver":
        """Find the config's servers. ``tasks`` are not needed: the servers decide how long a context may be."""
        return cls(config, announce)

    def profile(self, directory: Any, steps: int = 0, **about: Any) -> Any:
        """There is nothing here to profile."""
        raise RrmError("--profile is for the engine in this process: what servers do is in their own profiles")

    def describe(self) -> dict[str, Any]:
        """The model and the servers, for the header and ``run.json``."""
        config, servers, plans = self.resolved, self.servers, self.backend.asking.plans
        return {
            "model": config.model,
            "backend": config.backend,
            "base_urls": list(config.base_urls),
            "continued_by": config.continue_by,
            "max_sequence_tokens": config.max_sequence_tokens,
            "prompt_style": config.prompt_style,
            "sampling": {str(phase): {**plans[phase].sampling, **plans[phase].extra} for phase in BUDGETS},
            "grammar": [str(phase) for phase in BUDGETS if plans[phase].grammar is not None],
            **({"without_grammar": servers.without_grammar} if servers.without_grammar else {}),
            **({"without_openings": servers.without_opens} if servers.without_opens else {}),
            **({"refused": servers.refused} if servers.refused else {}),
        }

    def close(self) -> None:
        super().close()
        self._transport.close()

    def _files(self, config: RunConfig, replica: Replica) -> ModelFiles | None:
        """The model's tokenizer, where nodes go on by its tokens."""
        if config.backend == "responses" or config.continue_by == "turn":
            return None
        if config.continue_by == "auto" and self._transport.wait(returned_ids(replica, config.model, [1, 2])) is None:
            return None
        name = config.tokenizer or config.model
        files = read_model_files(name)
        prompt = ChatFormat(files.tokenizer, files.eos_ids).opening("", ASKED)
        found = self._transport.wait(returned_ids(replica, config.model, prompt))
        if found is None:
            raise RrmError(f"--continue-by tokens: {replica.name} does not return token ids: give --continue-by turn")
        ids, text = found
        own = str(files.tokenizer.decode(ids, skip_special_tokens=True))
        if text.strip() not in str(files.tokenizer.decode(ids)) and own.strip() != text.strip():
            raise RrmError(
                f"the tokenizer of {name} is not that of the model behind {replica.name}, which wrote {text!r} where "
                f"it reads {own!r}: name the right one with --tokenizer"
            )
        return files


async def _ask(replica: Replica, config: Resolved, style: Style, chat: ChatFormat | None) -> Servers:
    """Find out what the servers take, from the first of them."""
    client, model = patient(replica), config.model
    base: dict[str, Any] = {"model": model}
    if chat is not None:
        servers = Servers(TokenApi(), TokenContexts(chat))
        create = client.completions.create
        base |= {"prompt": chat.opening("", ASKED), "max_tokens": 1}
    elif config.backend == "responses":
        servers = Servers(ResponsesApi(), TurnContexts(), opens=False)
        servers.without_opens = "the Responses API cannot go on with an answer"
        create = client.responses.create
        base |= {"input": ASKED, "max_output_tokens": 16}
    else:
        servers = Servers(ChatApi(), TurnContexts())
        create = client.chat.completions.create
        base |= {"messages": [{"role": "user", "content": ASKED}], "max_tokens": 1}
    options = additions(config, style, switch=chat is None and config.backend == "openai")
    if config.backend == "openai" and chat is None:
        options["stream_options"] = {"include_usage": True}
        if await takes(replica, create, {}, **base) is not None:
            del base["max_tokens"]
            base["max_completion_tokens"] = 16
            servers.more["limit"] = "max_completion_tokens"
    only = {"stream": True} if "stream_options" in options else {}
    servers.refused = await refused(replica, create, options, **base, **only)
    servers.taken = frozenset(options.keys() - servers.refused.keys())
    if "stream_options" in servers.taken:
        servers.more["stream_options"] = options["stream_options"]
    if isinstance(servers.api, ChatApi):
        await _ask_to_go_on(replica, servers, create, base)
    if not style.has_openings:
        servers.without_opens = ""
    if config.constrain == "on":
        switch = options.get("chat_template_kwargs") if "chat_template_kwargs" in servers.taken else None
        await _ask_for_grammar(
            replica, config, servers, create, base, {"chat_template_kwargs": switch} if switch else {}
        )
    return servers


async def _ask_to_go_on(replica: Replica, servers: Servers, create: Any, base: dict[str, Any]) -> None:
    """Whether the servers go on with an assistant's last message: the prompt must then be shorter than one in which
    that message is over and another one begins.
    """
    said = [*base["messages"], {"role": "assistant", "content": "Certainly, yes"}]
    going_on: int | str | None
    try:
        going_on, over = [
            await prompt_tokens(replica, create, options, **{**base, "messages": said})
            for options in (GOING_ON, {"add_generation_prompt": True})
        ]
    except RrmError as error:  # some break at a conversation that ends with the assistant
        going_on, over = str(error), None
    if isinstance(going_on, str):
        servers.without_opens = going_on
    elif not isinstance(over, int) or not going_on or going_on >= over:
        servers.without_opens = "its count of prompt tokens does not show that it goes on with an assistant's message"
    servers.opens = not servers.without_opens
    servers.api = ChatApi(continues=servers.opens)


async def _ask_for_grammar(
    replica: Replica, config: Resolved, servers: Servers, create: Any, base: dict[str, Any], more: dict[str, Any]
) -> None:
    """Whether the servers hold a phase to our grammar; if they do not, its text is read leniently, as any is.

    A server that does not know grammars may well take one: it has to be seen that it keeps to one.
    """
    if config.backend == "responses":
        servers.without_grammar = "the Responses API has none of this kind"
        return
    grammar = event_grammar(config.max_sibling_width, may_split=True, marks=servers.contexts.marks)
    why = await takes(replica, create, {"structured_outputs": {"grammar": grammar}, **more}, **base)
    if why is None and not await keeps_to(replica, create, more, **base):
        why = "it takes a grammar and does not keep to it"
    servers.grammar = why is None
    servers.without_grammar = why or ""


def _replicas(config: RunConfig, secret: str) -> list[Replica]:
    timeout = httpx2.Timeout(config.request_timeout, connect=CONNECT_TIMEOUT_S)
    return [
        Replica(
            url, openai.AsyncOpenAI(base_url=url, api_key=secret or "none", max_retries=0, timeout=cast(Any, timeout))
        )
        for url in config.base_urls
    ]


def _api_key(config: RunConfig) -> str:
    if config.api_key_env is None:
        return ""
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise RrmError(f"--api-key-env {config.api_key_env}: there is no such environment variable, or it is empty")
    return key


def _headers(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"} if secret else {}


def _kind(model: str) -> str:
    """The model type that a name tells of, for the prompt style."""
    return "qwen3" if "qwen3" in model.lower() else ""
