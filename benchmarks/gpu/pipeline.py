"""A pipeline of four stages that all lie on the one device: what the stages' bookkeeping costs."""

from time import perf_counter

from gpu.lab import BLOCK_SIZE, Lab, Row, random_tokens
from rrm_engine.engine.engine import Engine
from rrm_engine.engine.runner import ModelRunner
from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.kv.cache import KVCache
from rrm_engine.kv.pool import BlockPool

SEQUENCES, PROMPT = 16, 64


def run(lab: Lab, rows: list[Row]) -> None:
    model, tokens = lab.model(), 4 if lab.tiny else 48
    blocks = SEQUENCES * (-(-(PROMPT + tokens + 2) // BLOCK_SIZE) + 1)
    runner = ModelRunner(model.forward, KVCache(blocks, BLOCK_SIZE, model.shapes), model.device, model.attend)
    vocabulary = model.model.config.vocab_size  # type: ignore[union-attr]
    for stages in (1, 4, 1, 4):  # the first two compile and capture
        engine = Engine(
            runner,
            BlockPool(blocks, BLOCK_SIZE, prefix_cache=False),
            max_sequences=SEQUENCES,
            step_tokens=4096,
            max_sequence_tokens=PROMPT + tokens + 2,
            eos_ids=frozenset(),
            stages=stages,
        )
        for i in range(SEQUENCES):
            prompt = random_tokens(PROMPT, vocabulary, i)  # type: ignore[arg-type]
            engine.submit(f"s{i}", prompt, tokens, SamplingParams(), root=i)
        lab.synchronize()
        began = perf_counter()
        while engine.has_work:
            engine.step()
        lab.synchronize()
        seconds = perf_counter() - began
        rows.append({"stages": stages, "steps": engine.steps, "tokens_per_s": SEQUENCES * tokens / seconds})
    del rows[:2]
