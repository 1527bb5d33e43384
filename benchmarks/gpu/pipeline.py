"""A pipeline of four stages that all lie on the one device: what the stages' bookkeeping costs.

It gets four times as many sequences, so that its steps are as large as those of one stage and read as much: a token
costs as much then, less what launching, sampling and handing out four steps in flight costs more.
"""

from dataclasses import replace
from time import perf_counter

from gpu.lab import BLOCK_SIZE, Lab, Row, random_tokens
from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.settings import EngineSettings
from rrm_engine.loading.engines import build_engine, build_runner

BATCH, STAGES, PROMPT = 4, 4, 64


def run(lab: Lab, rows: list[Row]) -> None:
    model, tokens = lab.model(), 4 if lab.tiny else 48
    blocks = BATCH * STAGES * (-(-(PROMPT + tokens + 2) // BLOCK_SIZE) + 1)
    settings = EngineSettings(
        blocks=blocks,
        block_size=BLOCK_SIZE,
        prefix_cache=False,
        max_sequences=BATCH * STAGES,
        step_tokens=4096,
        max_sequence_tokens=PROMPT + tokens + 2,
        lookahead=lab.on_cuda,
    )
    runner = build_runner(model, settings)
    for stages in (1, STAGES, 1, STAGES):  # the first two compile and capture
        count = BATCH * stages
        engine = build_engine(model, replace(settings, stages=stages), runner)
        for i in range(count):
            prompt = random_tokens(PROMPT, model.vocabulary, i)
            engine.submit(f"s{i}", prompt, tokens, SamplingParams(), root=i)
        lab.synchronize()
        began = perf_counter()
        while engine.has_work:
            engine.step()
        lab.synchronize()
        seconds = perf_counter() - began
        rows.append(
            {"stages": stages, "sequences": count, "steps": engine.steps, "tokens_per_s": count * tokens / seconds}
        )
    del rows[:2]
