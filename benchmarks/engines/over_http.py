"""vLLM behind HTTP, asked as the bench's ``openai`` backend asks it."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from uuid import uuid4

import httpx2
import openai

from rrm_engine.backends.http.call import Call
from rrm_engine.backends.http.pool import Pool, Replica
from rrm_engine.backends.http.transport import Transport
from rrm_engine.backends.http.wire import Ask, Delta, TokenApi
from rrm_engine.errors import RrmError
from rrm_engine.replay.peers import Got

LAUNCH = Path(__file__).resolve().parents[2] / "scripts" / "launch_vllm"
NAME = "peer"  # that the model is served as
REQUEST_TIMEOUT_S = 600.0


class Server:
    """One replica that scripts/launch_vllm starts and ends."""

    def __init__(self, python: str, model: str, device: str, port: int, flags: str, logs: Path) -> None:
        """Wait until it is healthy. Raises RrmError if it ends before."""
        command = [sys.executable, str(LAUNCH), model, "--name", NAME, "--replicas", "1", "--port", str(port)]
        command += ["--device", device, "--python", python, "--logs", str(logs), f"--vllm={flags}"]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        if not self.url:
            raise RrmError(f"its server ended with {self._process.wait()} before it was healthy; see {logs}")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


class OverHttp:
    """See `replay.peers.Requests`: every request is a stream of token ids."""

    def __init__(self, url: str, most: int) -> None:
        """At most ``most`` streams at once."""
        self._transport = Transport()
        client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=REQUEST_TIMEOUT_S)
        self._pool = Pool([Replica(url, client)], most, httpx2.AsyncClient())
        self._inbox: SimpleQueue[tuple[Call, Delta | Exception]] = SimpleQueue()
        self._requests: dict[Call, str] = {}
        self._salt = ""

    def begin(self) -> None:
        """Another salt: nothing that the server's prefix cache has fits the requests of this replay."""
        self._salt = uuid4().hex

    def submit(self, request: str, tokens: Sequence[int], decode: int) -> None:
        extra = {"min_tokens": decode, "ignore_eos": True, "cache_salt": self._salt}
        ask = Ask(list(tokens), decode, {"temperature": 0.0}, extra)
        call = Call(ask, 0, None, lambda call, item: self._inbox.put((call, item)))
        self._requests[call] = request
        call.handle = self._transport.start(call.run(self._pool, TokenApi(), NAME))

    def receive(self) -> Iterator[Got]:
        call, item = self._inbox.get()
        while True:
            yield self._got(call, item)
            try:
                call, item = self._inbox.get_nowait()
            except Empty:
                return

    def end(self) -> None:
        for call in self._requests:
            call.handle.cancel()
        self._requests = {}

    def close(self) -> None:
        self._transport.close()

    def _got(self, call: Call, item: Delta | Exception) -> Got:
        if isinstance(item, Exception):
            raise item
        if call.attempts > 1:
            raise RrmError(f"a stream of {self._requests[call]} broke and was asked for again: its time is no figure")
        ended = item.end is not None
        cached = call.usage.cached if ended and call.usage is not None else None
        return Got(self._requests[call], item.tokens, ended, cached)
