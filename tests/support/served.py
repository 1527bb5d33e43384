"""A small server of the packaged model that speaks the OpenAI APIs over HTTP, with transformers' own forward pass, and
breaks on purpose. As a program, ``python served.py PORT``, it can be killed.
"""

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from rrm_engine.loading.checkpoint import find
from rrm_engine.protocol.grammar import EventGrammars

MODEL = "embedded"


@cache
def _loaded() -> tuple[Any, Any]:
    folder = find(MODEL).folder
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


_computing = threading.Lock()
_next: dict[tuple[str | None, tuple[int, ...]], int] = {}  # by grammar and context; most tests ask for the same ones


@cache
def _grammars() -> EventGrammars:
    return EventGrammars(_loaded()[1])


def greedy(prompt: list[int], most: int, ignore_eos: bool = False, grammar: str | None = None) -> Iterator[int]:
    """The likeliest tokens after ``prompt`` that ``grammar`` (Lark) allows, up to the end of sequence."""
    matcher = None if grammar is None else _grammars().matcher(grammar)
    model, tokenizer = _loaded()
    cache, context, ids = DynamicCache(), list(prompt), list(prompt)
    for _ in range(most):
        place = grammar, tuple(context)
        if place not in _next:
            with _computing, torch.inference_mode():
                logits = model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            row, ids = logits[0, -1], []
            if matcher is not None:
                allowed = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")[: len(row)]
                row = row.masked_fill(torch.from_numpy(allowed == 0), -torch.inf)
            _next[place] = int(row.argmax())
        token = _next[place]
        if matcher is not None:
            matcher.accept(token)
        yield token
        if token == tokenizer.eos_token_id and not ignore_eos:
            return
        context.append(token)
        ids.append(token)


@dataclass
class Asked:
    """A request for a stream, and what came of it."""

    path: str
    body: dict[str, Any]
    key: str
    sent: int = 0  # tokens
    hung_up: bool = False  # by the client, before the end


@dataclass
class Habits:
    """How a server behaves. ``faults`` are of the next streams, in order: a status, or (kind, tokens before it) with
    the kinds cut, hang, malformed, shape, error, nameless (no finish reason).
    """

    faults: deque[Any] = field(default_factory=deque)
    token_ids: bool = True
    continues: bool | None = True  # knows continue_final_message; None: takes it and does nothing about it
    grammars: bool = False  # knows structured_outputs; False: takes them and does nothing about it
    per_chunk: int = 1
    pace: float = 0.002  # seconds between chunks: as if each token were computed
    waiting: int | None = None  # what /metrics says; None: there is none
    unknown: tuple[str, ...] = ()  # fields that are refused
    key: str = ""  # that it wants
    longest: int = 2048
    reasoning: str = ""  # sent before the text, in this field
    asked: list[Asked] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def log_message(self, *args: Any) -> None: ...

    def do_GET(self) -> None:
        habits = self.server.habits
        if self.path == "/metrics":
            if habits.waiting is None:
                self._json(404, {"detail": "Not Found"})
            else:
                self._send(200, f'vllm:num_requests_waiting{{engine="0"}} {habits.waiting}.0\n'.encode(), "text/plain")
        else:
            self._json(
                200, {"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": habits.longest}]}
            )

    def do_POST(self) -> None:
        habits = self.server.habits
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if habits.key and key != habits.key:
            self._json(401, {"error": {"message": f"wrong key {key}, {habits.key} is right"}})
            return
        if unknown := [name for name in habits.unknown if name in body]:
            self._json(422, {"detail": f"unknown: {unknown}"})
            return
        asked, fault = Asked(self.path, body, key), None
        if body.get("stream") and body.get("max_tokens", body.get("max_output_tokens", 99)) > 16:
            habits.asked.append(asked)
            fault = habits.faults.popleft() if habits.faults else None
        if isinstance(fault, int):
            self._json(fault, {"error": {"message": f"as told: {fault}", "code": fault}})
            return
        try:
            self._answer(asked, fault)
        except OSError:
            asked.hung_up = True
            self.close_connection = True

    def _answer(self, asked: Asked, fault: tuple[str, int] | None) -> None:
        habits, body, tokenizer = self.server.habits, asked.body, _loaded()[1]
        speaks: Any = {"/v1/completions": Completion, "/v1/chat/completions": Chat, "/v1/responses": Response}[
            self.path
        ]
        speaker = speaks(habits, tokenizer)
        if body.get("continue_final_message") and habits.continues is False:
            self._json(400, {"error": {"message": "continue_final_message is unknown"}})
            return
        prompt = speaker.prompt(body)
        most = min(body.get("max_tokens") or body.get("max_output_tokens") or 16, habits.longest - len(prompt))
        grammar = body.get("structured_outputs", {}).get("grammar") if habits.grammars else None
        if most < 1:
            self._json(400, {"error": {"message": f"the maximum context length is {habits.longest}"}})
            return
        if not body.get("stream"):
            self._json(200, speaker.whole(prompt, list(greedy(prompt, most, grammar=grammar))))
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        for event in speaker.before(prompt):
            self._event(event)
        ids: list[int] = []
        held: list[int] = []
        for token in greedy(prompt, most, bool(body.get("ignore_eos")), grammar):
            held.append(token)
            ids.append(token)
            if fault is not None and len(ids) > fault[1]:
                self._break(fault[0])
                return
            if len(held) < habits.per_chunk and token != tokenizer.eos_token_id:
                continue
            self._event(speaker.chunk(prompt, ids[: -len(held)], held))
            asked.sent, held = len(ids), []
            time.sleep(habits.pace)
        reason = "stop" if ids[-1] == tokenizer.eos_token_id else "length"
        nameless = fault is not None and fault[0] == "nameless"
        for event in speaker.after(prompt, ids, held, None if nameless else reason):
            self._event(event)
        with suppress(OSError):
            self.wfile.write(b"data: [DONE]\n\n")

    def _break(self, kind: str) -> None:
        if kind == "hang":
            self.server.let_go.wait(30)
        elif kind == "malformed":
            self._line("{this is no JSON")
        elif kind == "shape":
            self._line('{"choices": [{"delta": 3, "text": 7, "token_ids": ["x"], "finish_reason": null}]}')
        elif kind == "error":
            self._event({"error": {"message": "the engine died", "code": 500}})
        # cut: that is all

    def _event(self, event: Any) -> None:
        self._line(json.dumps(event))

    def _line(self, text: str) -> None:
        self.wfile.write(f"data: {text}\n\n".encode())
        self.wfile.flush()

    def _json(self, status: int, body: Any) -> None:
        self._send(status, json.dumps(body).encode(), "application/json")

    def _send(self, status: int, data: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class _Speaker:
    def __init__(self, habits: Habits, tokenizer: Any) -> None:
        self.habits, self.tokenizer = habits, tokenizer

    def text(self, before: list[int], ids: list[int]) -> str:
        """What ``ids`` add to the text."""
        decode = self.tokenizer.decode
        return str(decode([*before, *ids], skip_special_tokens=True)[len(decode(before, skip_special_tokens=True)) :])

    def usage(self, prompt: list[int], ids: list[int]) -> dict[str, Any]:
        cached = {"cached_tokens": 16 * (len(prompt) // 32)}
        return {"prompt_tokens": len(prompt), "completion_tokens": len(ids), "prompt_tokens_details": cached}

    def before(self, prompt: list[int]) -> list[Any]:
        return []


class Completion(_Speaker):
    def prompt(self, body: dict[str, Any]) -> list[int]:
        prompt = body["prompt"]
        return prompt if isinstance(prompt, list) else list(self.tokenizer(prompt)["input_ids"])

    def choice(self, prompt: list[int], before: list[int], ids: list[int], **more: Any) -> dict[str, Any]:
        told = {"token_ids": ids, "prompt_token_ids": None if before else prompt} if self.habits.token_ids else {}
        return {"index": 0, "text": self.text(before, ids), "finish_reason": None, **told, **more}

    def whole(self, prompt: list[int], ids: list[int]) -> Any:
        return {"choices": [self.choice(prompt, [], ids, finish_reason="length")], "usage": self.usage(prompt, ids)}

    def chunk(self, prompt: list[int], before: list[int], ids: list[int]) -> Any:
        return {"choices": [self.choice(prompt, before, ids)]}

    def after(self, prompt: list[int], ids: list[int], held: list[int], reason: str | None) -> list[Any]:
        last = self.choice(prompt, ids[: len(ids) - len(held)], held, finish_reason=reason)
        return [{"choices": [last]}, {"choices": [], "usage": self.usage(prompt, ids)}]


class Chat(_Speaker):
    def prompt(self, body: dict[str, Any]) -> list[int]:
        going_on = bool(body.get("continue_final_message")) and self.habits.continues is not None
        text = self.tokenizer.apply_chat_template(
            body["messages"], tokenize=False, add_generation_prompt=not going_on, continue_final_message=going_on
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def before(self, prompt: list[int]) -> list[Any]:
        first: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        if self.habits.reasoning:
            first += [{self.habits.reasoning: "Let me"}, {self.habits.reasoning: " see."}]
        return [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in first]

    def whole(self, prompt: list[int], ids: list[int]) -> Any:
        message = {"role": "assistant", "content": self.text([], ids)}
        return {
            "choices": [{"index": 0, "message": message, "finish_reason": "length"}],
            "usage": self.usage(prompt, ids),
        }

    def chunk(self, prompt: list[int], before: list[int], ids: list[int]) -> Any:
        return {"choices": [{"index": 0, "delta": {"content": self.text(before, ids)}, "finish_reason": None}]}

    def after(self, prompt: list[int], ids: list[int], held: list[int], reason: str | None) -> list[Any]:
        text = self.text(ids[: len(ids) - len(held)], held)
        last = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
        return [{"choices": [last]}, {"choices": [], "usage": self.usage(prompt, ids)}]


class Response(_Speaker):
    def prompt(self, body: dict[str, Any]) -> list[int]:
        said = body["input"]
        messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
        return Chat(self.habits, self.tokenizer).prompt({"messages": messages})

    def before(self, prompt: list[int]) -> list[Any]:
        first = [{"type": "response.created", "response": {"id": "r"}}]
        return first + [{"type": "response.reasoning_text.delta", "delta": "Hm."}] * bool(self.habits.reasoning)

    def whole(self, prompt: list[int], ids: list[int]) -> Any:
        return {"id": "r", "object": "response", "output": [], "status": "completed"}

    def chunk(self, prompt: list[int], before: list[int], ids: list[int]) -> Any:
        return {"type": "response.output_text.delta", "delta": self.text(before, ids)}

    def after(self, prompt: list[int], ids: list[int], held: list[int], reason: str | None) -> list[Any]:
        usage = {"input_tokens": len(prompt), "output_tokens": len(ids), "input_tokens_details": {"cached_tokens": 16}}
        if reason is None:
            return []
        kind = "completed" if reason == "stop" else "incomplete"
        response = {"id": "r", "usage": usage, "incomplete_details": {"reason": "max_output_tokens"}}
        return [{"type": f"response.{kind}", "response": response}]


SPEAKERS: dict[str, Any] = {
    "/v1/completions": Completion,
    "/v1/chat/completions": Chat,
    "/v1/responses": Response,
}


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int, habits: Habits) -> None:
        _loaded()  # not by several requests at once
        super().__init__(("127.0.0.1", port), Handler)
        self.habits = habits
        self.let_go = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error."""


@contextmanager
def served(**habits: Any) -> Iterator[Server]:
    """A server on a free port of the loopback, in a thread."""
    server = Server(0, Habits(**habits))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.let_go.set()
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    torch.set_num_threads(1)
    Server(int(sys.argv[1]), Habits(pace=float(sys.argv[2]))).serve_forever()
