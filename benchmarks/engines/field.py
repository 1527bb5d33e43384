"""The engines of benchmarks/peers.py: each is started here, or left out with a reason."""

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

from rrm_engine.errors import RrmError
from rrm_engine.loading.checkpoint import EMBEDDED, find
from rrm_engine.loading.geometry import PREFIX
from rrm_engine.loading.load import load_pretrained, resolve_device
from rrm_engine.replay.contender import Contender
from rrm_engine.replay.driver import Memory, Ours
from rrm_engine.replay.graph import Decode, Graph, Node
from rrm_engine.replay.peers import Peer
from rrm_engine.replay.variant import Variant

TRIAL = Graph("trial", {"root": Node(4, (Decode(2),))}).drawn(100)
GIB = 2**30


class LeftOut(Exception):
    """A peer cannot take part; the message says why."""


class Field:
    """The contenders that could be started. ``graphs`` is all that they will be asked for."""

    def __init__(self, memory: Memory, graphs: Sequence[Graph], args: argparse.Namespace, closing: ExitStack) -> None:
        self.contenders: list[Contender] = []
        self.allowed: dict[str, str] = {}  # what each was given
        self.left_out: dict[str, str] = {}
        self._memory, self._args, self._closing = memory, args, closing
        self._longest = max(graph.length(name) for graph in graphs for name in graph.nodes) + 1
        self._most = max(len(graph.nodes) for graph in graphs)
        token_bytes = sum(shape.bytes_per_token for shape in memory.model.shapes.values())
        self._kv_bytes = token_bytes * max(sum(map(graph.length, graph.nodes)) for graph in graphs)
        self._plain: Any = None

    def enter(self, name: str) -> None:
        """Start ``name`` and have it decode two tokens; a peer that cannot is left out."""
        start: dict[str, Callable[[], tuple[Contender, str]]] = {
            "ours": self._ours,
            "vllm": self._vllm,
            "vllm-http": self._vllm_http,
            "generate-batch": self._generate_batch,
            "generate": self._generate,
        }
        try:
            contender, allowed = start[name]()
            contender.replay(TRIAL)
        except Exception as error:
            if name == "ours":
                raise
            self.left_out[name] = (
                str(error) if isinstance(error, LeftOut | RrmError) else f"{type(error).__name__}: {error}"
            )
        else:
            self.contenders.append(contender)
            self.allowed[name] = allowed

    def able(self, graphs: Sequence[Graph]) -> list[Contender]:
        """Those that can replay ``graphs``."""
        joined = any(graph.parents for graph in graphs)
        return [one for one in self.contenders if one.name != "generate" or not joined]

    def _ours(self) -> tuple[Contender, str]:
        memory = self._memory
        said = (
            f"prefix cache on, blocks of {memory.block_size} tokens, waiting parents pinned, at most "
            f"{memory.settings.step_tokens} tokens a step, attention {memory.model.attention}; tokens forced"
        )
        return Ours(Variant("ours"), memory), said

    def _vllm(self) -> tuple[Contender, str]:
        from engines.elsewhere import Elsewhere

        args = self._args
        settings = {
            "model": self._folder(),
            "dtype": self._dtype,
            "device": self._memory.model.device.type,
            "longest": self._longest,
            "sequences": self._most,
            "kv_bytes": self._kv_bytes,
            "block_size": args.vllm_block_size,
            "eager": args.vllm_eager,
            "threads": args.threads,
        }
        peer = Elsewhere("vllm", self._python(), settings, args.out / "vllm.log")
        self._closing.callback(peer.close)
        about = peer.about
        compiled = "compiled" if about["compiled"] else "eager (no torch.compile)"
        said = (
            f"vLLM {about['version']}, no server, {compiled}, prefix cache on, blocks of {about['block_size']} tokens, "
            f"at most {about['step_tokens']} tokens a step; emptied before each replay"
        )
        return peer, said

    def _vllm_http(self) -> tuple[Contender, str]:
        if missing := [name for name in ("openai", "httpx2") if find_spec(name) is None]:
            raise LeftOut(f"{' and '.join(missing)} cannot be imported: pip install 'rrm-engine[servers]'")
        from engines.over_http import OverHttp, Server

        args, python, device = self._args, self._python(), self._memory.model.device.type
        flags = [f"--dtype {self._dtype} --max-model-len {self._longest} --max-num-seqs {self._most}"]
        flags += ["--enforce-eager"] if args.vllm_eager else []
        flags += [f"--block-size {args.vllm_block_size}"] if args.vllm_block_size else []
        if device == "cpu":
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(1 + self._kv_bytes // GIB)
        server = Server(python, self._folder(), device, free_port(), " ".join(flags), args.out)
        self._closing.callback(server.close)
        requests = OverHttp(server.url, self._most)
        self._closing.callback(requests.close)
        said = (
            "vLLM as above behind its server in two more processes, streams of token ids; a cache salt for each replay"
        )
        return Peer("vllm-http", requests), said

    def _generate_batch(self) -> tuple[Contender, str]:
        from engines.plain import HF_BLOCK, ContinuousBatching

        step_tokens = self._memory.settings.step_tokens
        requests = ContinuousBatching(self._model(), self._longest, self._most, step_tokens)
        said = (
            f"transformers' continuous batching, sdpa, blocks of {HF_BLOCK} tokens shared where whole ones are equal, "
            f"at most {step_tokens} tokens a step, a manager for each replay, started before its clock"
        )
        return Peer("generate-batch", requests), said

    def _generate(self) -> tuple[Contender, str]:
        from engines.plain import Generate

        return Generate(self._model()), "transformers' static batch, sdpa, dynamic cache; side by side only"

    @property
    def _dtype(self) -> str:
        return str(self._memory.model.dtype).removeprefix("torch.")

    def _model(self) -> Any:
        """The model as transformers has it, for both of its engines."""
        if self._plain is None:
            self._plain = load_pretrained(self._args.model, self._dtype, resolve_device(self._args.device))[0]
        return self._plain

    def _folder(self) -> str:
        """The weights as vLLM finds them."""
        name = self._args.model
        if name.startswith(PREFIX) or name.lower().endswith(".gguf"):
            raise LeftOut(f"it needs the weights as a directory or a hub id, and --model is {name}")
        return str(find(name).folder) if name == EMBEDDED else name

    def _python(self) -> str:
        """The Python that has vLLM."""
        python = self._args.vllm_python or sys.executable
        asked = "import importlib.util, json; print(json.dumps(importlib.util.find_spec('vllm') is not None))"
        try:
            done = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=False)
        except OSError as error:
            raise LeftOut(f"--vllm-python {python}: {error.strerror}") from None
        if done.returncode or not json.loads(done.stdout):
            raise LeftOut(f"vLLM is not installed for {python}: name another one with --vllm-python")
        return python


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
