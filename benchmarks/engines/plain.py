"""transformers' own ``generate``, and its continuous batching, the engine of ``generate_batch``."""

from collections.abc import Iterator, Sequence
from time import perf_counter, sleep
from typing import Any

from decode import HF_BLOCK, generate_run
from transformers import GenerationConfig

from rrm_engine.replay.contender import Replayed
from rrm_engine.replay.graph import Graph, ids
from rrm_engine.replay.peers import Got


class Generate:
    """One static batch. It can run graphs of roots alone, equally long: nothing can be started in mid-run there."""

    name = "generate"

    def __init__(self, model: Any) -> None:
        self._run = generate_run(model)

    def replay(self, graph: Graph) -> Replayed:
        (count,) = {node.decoded for node in graph.nodes.values()}
        prompts = [ids(graph.shared_prefix) + ids(node.prompt) for node in graph.nodes.values()]
        began = perf_counter()
        self._run(prompts, count)
        return Replayed(perf_counter() - began, [])


class ContinuousBatching:
    """See `replay.peers.Requests`. A manager for each replay, started before its clock."""

    def __init__(self, model: Any, longest: int, most: int, step_tokens: int) -> None:
        """KV for ``most`` sequences of ``longest`` tokens; left to itself it would take most of the free memory."""
        model.set_attn_implementation("sdpa")
        self._model = model.eval()
        self._room = {"num_blocks": (most + 2) * -(-longest // HF_BLOCK), "max_batch_tokens": step_tokens}
        self._manager: Any = None
        self._heard: dict[str, int] = {}  # tokens of every request so far

    def begin(self) -> None:
        from transformers import ContinuousBatchingConfig

        config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, use_cache=True)
        self._manager = self._model.init_continuous_batching(config, ContinuousBatchingConfig(**self._room))
        self._manager.start()
        while self._manager.batch_processor is None and self._manager.is_running():
            sleep(0.001)
        self._heard = {}

    def submit(self, request: str, tokens: Sequence[int], decode: int) -> None:
        self._heard[request] = 0
        self._manager.add_request(list(tokens), request, max_new_tokens=decode, streaming=True)

    def receive(self) -> Iterator[Got]:
        output = self._manager.get_result()
        if output is None or output.error is not None:
            raise RuntimeError(f"generate_batch failed: {output.error if output else 'its thread has ended'}")
        request, tokens = output.request_id, output.generated_tokens
        new = tokens[self._heard[request] :]
        self._heard[request] = len(tokens)
        yield Got(request, list(new), output.is_finished())

    def end(self) -> None:
        self._manager.destroy()
        self._manager = None
