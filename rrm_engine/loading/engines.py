"""An engine over a loaded model: put together here, for whatever runs one."""

from dataclasses import replace

from rrm_engine.device.memory import in_units, refuse_out_of_memory
from rrm_engine.engine.draft import Drafting
from rrm_engine.engine.engine import Engine
from rrm_engine.engine.runner import ModelRunner, Observer
from rrm_engine.engine.settings import EngineSettings
from rrm_engine.kv.cache import KVCache, bytes_per_block
from rrm_engine.kv.host import SwapCosts
from rrm_engine.loading.prepare import LoadedModel
from rrm_engine.loading.rotary import find_rotary
from rrm_engine.loading.row_costs import measure_row_costs
from rrm_engine.loading.swap_costs import measure_swap_costs


def build_runner(model: LoadedModel, settings: EngineSettings, observe: Observer | None = None) -> ModelRunner:
    """What runs the steps of engines with such settings, and its KV: one engine's at a time. ``observe`` is told what
    every step computes.

    Raises RrmError where memory does not hold the blocks, UnsupportedModel where KV is to be spliced and cannot be.
    """
    size = in_units(settings.blocks * bytes_per_block(model.shapes, settings.block_size))
    with refuse_out_of_memory(
        f"{settings.blocks:,} KV blocks take {size}, more than {model.device} gives: give a smaller number as "
        f"--kv-blocks"
    ):
        cache = KVCache(settings.blocks, settings.block_size, model.shapes)
    rotary = find_rotary(model) if settings.splices else {}
    return ModelRunner(model.forward, cache, model.device, model.attend, settings.eager, rotary, observe)


def build_engine(
    model: LoadedModel, settings: EngineSettings, runner: ModelRunner | None = None, costs: SwapCosts | None = None
) -> Engine:
    """An engine with an empty pool. ``runner`` is one that no other engine uses any more; it may have more blocks.

    ``costs`` are what moving and recomputing KV cost; they are measured where the wait policy asks for them and they
    are not known. Otherwise raises as `build_runner` and `Engine` do.
    """
    runner = runner or build_runner(model, settings)
    if settings.wait_policy == "auto" and costs is None:
        costs = measure_swap_costs(runner, min(settings.step_tokens, settings.max_sequence_tokens - 1))
    engine = Engine(runner, replace(settings, vocabulary=model.vocabulary), costs)
    if settings.drafts:
        rows = measure_row_costs(runner, settings.max_sequence_tokens) if settings.weigh_drafts else None
        if rows is not None or not settings.weigh_drafts:
            engine.draft(Drafting(settings.drafts, settings.eos_ids, rows))
    return engine
