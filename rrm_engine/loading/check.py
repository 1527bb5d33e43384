"""The check at load: is what we make of a model the model, up to rounding?

A packed, chunked run in bf16 is never a plain one: rounding alone can move a deep model's logits by as much as a wrong
scale would. So nothing is compared that has come through many layers. Transformers' own run notes what it has at each
place of each layer (``loading/places.py``); ours, packed, in chunks and decodes, over blocks, is given the plain run's
value at each of these places and must have found the same there itself. What may differ is what rounding does at that
place, which is measured, not assumed (``loading/rounding.py``), so that a bound of ``ALLOWED`` times that holds for any
dtype, depth and family. Layers that are right one by one are then run once as they will be, and the logits compared
with how far rounding at every place moves our own.

A place counts as wrong for a layer if more than a quarter of a sequence's tokens are beyond the bound, and for a token
if more than a quarter of the layers are. Both are needed: a wrong position is one token's, a skipped bias one layer's,
while an expert or a tied softmax that rounding tips over is neither.

One of the two sequences continues a past that is longer than the attention's window, if there is one, and the other one
a past whose scores a soft-cap changes, if there is one; their KV is drawn, not computed, so that they cost next to
nothing.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from rrm_kernels.batch import PagedAttention
from rrm_kernels.flash import FlashUnsupported
from rrm_kernels.reference import paged_attention
from torch import nn

from rrm_engine.device.memory import is_out_of_memory
from rrm_engine.engine.packing import PackedStep, pack
from rrm_engine.engine.runner import ModelRunner
from rrm_engine.engine.scheduler import SchedulerOutput, Work
from rrm_engine.engine.scratch import Scratch, run_packed
from rrm_engine.errors import RrmError
from rrm_engine.kv.cache import KVCache, LayerShape
from rrm_engine.loading.places import PLAIN_ATTENTION, layer_inputs
from rrm_engine.loading.plain import LOGITS, Past, Place, Plain, run_plain
from rrm_engine.loading.rounding import deviation, jitter, widened
from rrm_engine.models.attention import ATTENTION_NAME, Exchange, Forward
from rrm_engine.models.fuse import parameters_read
from rrm_engine.models.spread import decoder_layers

# Of what rounding does. In bf16 and fp16 every product, norm and sum is rounded to the type again, however it was
# computed: measured up to 2.3 on models that are right, and 8 and more where the scale is off by 5 %. In fp32 sums of
# thousands keep the errors of their order: measured up to 8, and 300,000 with that scale.
ALLOWED = {torch.bfloat16: 4.0, torch.float16: 4.0, torch.float32: 100.0, torch.float64: 100.0}
ALLOWED_OF_LOGITS = 8.0  # the same for logits after all layers: a single sample of what rounding does there
EXCEPTIONS = 0.25  # share of the tokens, or of the layers, at which rounding may have tipped something over
# Of a single logit's difference over many positions and the whole vocabulary, relative to the logits' spread.
LARGEST = {torch.float32: 2e-3, torch.float64: 2e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
BLOCK_SIZE = 8
STOPS = ((9, 23, 24), (7, 8))  # where the two sequences' chunks end; the last one of each is a decode of one token
UNSUPPORTED = "models like this are not supported"
TRY_OTHERS = f"try --attention sdpa or another --dtype; if that is refused too, {UNSUPPORTED}"
TRY_ANOTHER_DTYPE = f"try another --dtype; if that is refused too, {UNSUPPORTED}"  # what sdpa runs was the last try
LONGEST_PAST = 8192  # tokens; a window beyond is not looked at

TEXTS = (
    "To solve 3x + 7 = 22, subtract 7 from both sides and divide by 3: x = 5. Check it: 3 * 5 + 7 = 22, which is so.",
    "Natural numbers are used for counting and for ordering. Some definitions begin with zero, others with one.",
)


@dataclass(slots=True)
class LoadCheck:
    """``reason`` is None if the model may be used, else ``advice`` is what to do; ``shapes`` are the layers' KV shapes.

    ``deviation`` is the farthest that a place lies off, in multiples of what rounding does there; ``error`` that of
    the logits after all layers, relative to their spread.
    """

    reason: str | None
    advice: str = UNSUPPORTED
    deviation: float = 0.0
    error: float = 0.0
    shapes: dict[int, LayerShape] = field(default_factory=dict)
    forward: Forward | None = None
    attend: PagedAttention | None = None
    slower: str | None = None  # what was wrong with the way before it


def refuse_known_mismatches(config: Any) -> str | None:
    """Why a model with this text config would be silently wrong, or None. What a short probe cannot see."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [v for v in rope.values() if isinstance(v, dict)]
    for kind in (r.get("rope_type", r.get("type")) for r in [rope, *nested]):
        if kind in ("longrope", "dynamic"):
            return (
                f"its {kind} rotary embedding depends on the longest sequence in the batch, "
                f"so a sequence's result would depend on its neighbours"
            )
    types = set(getattr(config, "layer_types", None) or ())
    if "chunked_attention" in types or getattr(config, "attention_chunk_size", None):
        return "its chunked attention is expressed only in a mask that transformers does not hand to attention"
    recurrent = sorted(t for t in types if t not in ("full_attention", "sliding_attention"))
    if recurrent:
        return f"its {', '.join(recurrent)} layers keep a state that is not a KV cache"
    return None


@torch.inference_mode()
def check_model(
    model: Any,
    tokenizer: Any,
    devices: Sequence[torch.device],
    optimise: Callable[[Any, Collection[nn.Module]], Iterable[tuple[Forward, PagedAttention]]],
) -> LoadCheck:
    """Run two sequences plainly, then the optimised model on them packed, in chunks and decodes; compare.

    ``optimise`` changes the model in place, but for the linear layers that it is given, whose parameters the model's
    own code reads; it yields ways to run it, each with its attention, the best first, and the first that is right is
    taken. Leaves the model switched to our attention. ``devices`` are those of its layers.
    """
    try:
        layers: Any = decoder_layers(model)[1]
    except RrmError:
        layers = None
    num_layers = model.config.get_text_config().num_hidden_layers
    try:
        model.set_attn_implementation(PLAIN_ATTENTION)
        with parameters_read(model) as read:
            plain = plain_runs(model, layers, devices, tokenizer)
        model.set_attn_implementation(ATTENTION_NAME)
    except Exception as e:  # whatever a family's own code raises
        if _is_ours(e):
            raise
        return LoadCheck(f"transformers' own run of it fails ({_brief(e)})")
    if not all(run.finite for run in plain):
        return _not_finite(model.dtype)
    if reason := _without_state(plain[0].values, num_layers):
        return LoadCheck(reason)
    result, slower = LoadCheck("there is no way to run it"), None
    for forward, attend in optimise(model, read):
        result = Check(forward, plain, layers, devices[0], attend).result(num_layers)
        result.slower = slower
        if result.reason is None:
            break
        slower = result.reason
    return result


def _without_state(places: Iterable[Place], num_layers: int) -> str | None:
    """Why layers that did not come by these places cannot be run, if there are any."""
    missing = sorted(set(range(num_layers)) - {layer for what, layer in places if what == "attention"})
    return f"layers {missing} never called the attention function, so their state cannot be kept" if missing else None


def _is_ours(error: Exception) -> bool:
    """Whether an invariant of the engine is broken, or memory has run out: neither says anything about the family."""
    return isinstance(error, AssertionError) or is_out_of_memory(error)


def _brief(error: Exception) -> str:
    """An unexpected error on one line."""
    lines = str(error).strip().splitlines()
    if isinstance(error, TypeError) and "rrm_" in str(error):
        return "it does not hand our arguments to its attention"
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _not_finite(dtype: torch.dtype) -> LoadCheck:
    if dtype == torch.float16:
        return LoadCheck("it overflows in float16, in plain transformers too", "use --dtype bfloat16 or float32")
    return LoadCheck("plain transformers computes NaN or infinite values with it", "its weights seem to be damaged")


def plain_runs(model: Any, layers: Any, devices: Sequence[torch.device], tokenizer: Any) -> list[Plain]:
    """The two sequences, run by transformers: see ``run_plain``."""
    first, second = (_prompt(tokenizer, text, stops[-1], model) for text, stops in zip(TEXTS, STOPS, strict=True))
    plain = run_plain(model, layers, devices, first, STOPS[0])
    past = _drawn_past(plain, _past_tokens(model))
    others = run_plain(model, layers, devices, second, STOPS[1], past)
    if cap := getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        past = _drawn_past(plain, 2 * BLOCK_SIZE, score=cap)
        plain = run_plain(model, layers, devices, first, STOPS[0], past)
    return [plain, others]


def _prompt(tokenizer: Any, text: str, count: int, model: Any) -> list[int]:
    """The first ``count`` tokens of ``text``; over again, or ids from the whole vocabulary, where it has too few."""
    vocabulary = model.config.get_text_config().vocab_size
    encode = getattr(tokenizer, "encode", None)
    tokens = [token for token in (encode(text) if encode else []) if 0 <= token < vocabulary]
    if len(set(tokens)) < count // 4:
        tokens = [(i + 1) * 7919 % vocabulary for i in range(count)]
    return (tokens * count)[:count]


def _past_tokens(model: Any) -> int:
    """How many tokens it takes in front of a prompt so that its attention window ends among them."""
    config = model.config.get_text_config()
    windows = {getattr(owner, "sliding_window", None) for owner in (config, *model.modules())}
    longest = max((w for w in windows if isinstance(w, int)), default=0)
    needed = longest + 2 * BLOCK_SIZE
    room = min(LONGEST_PAST, (getattr(config, "max_position_embeddings", None) or LONGEST_PAST) - STOPS[1][-1])
    return needed if STOPS[0][-1] < needed <= room else 0


def _drawn_past(plain: Plain, count: int, score: float | None = None) -> Past:
    """Random KV of ``count`` tokens like that in ``plain``, in front of it.

    Its keys lie close together, so that attention is spread over all of them and misses each one that is not seen, or
    far apart, so that scores are about as large as ``score``. Its values are large enough to be noticed.
    """
    generator = torch.Generator().manual_seed(count)

    def draw(values: torch.Tensor, mean: float, spread: float) -> torch.Tensor:
        known = widened(values)
        noise = torch.randn(count, *known.shape[1:], generator=generator).to(known.device)
        return (mean * known.mean(0) + spread * known.std(0) * noise).to(values.dtype)

    past = {}
    for layer in [layer for what, layer in plain.values if what == "keys"] if count else []:
        queries, keys, values = (plain.values[what, layer] for what in ("queries", "keys", "values"))
        spread = 0.3
        if score is not None:  # of which the models with such scores make as much as of the others: width ** -0.5
            spread = score / float(widened(queries).square().mean().sqrt() * widened(keys).std(0).mean())
        past[layer] = draw(keys, 1, spread), draw(values, 0, 16)
    return past


class Check:
    """One way to run the model, held against what the plain runs had."""

    def __init__(
        self, forward: Forward, plain: Sequence[Plain], layers: Any, device: torch.device, attend: PagedAttention
    ) -> None:
        self.forward = forward
        self.plain = plain
        self.layers = layers
        self.device = device
        self.attend = attend
        self.deviations: list[dict[Place, torch.Tensor]] = [{} for _ in plain]  # by sequence and place, of each token
        size = -(-BLOCK_SIZE // attend.block_multiple) * attend.block_multiple
        self.cache = KVCache(sum(-(-(p.past_tokens + len(p.tokens)) // size) for p in plain), size)

    def result(self, num_layers: int) -> LoadCheck:
        """Run it and judge."""
        try:
            self._store_past()
            self._run_place_by_place()
            if reason := _without_state(self.deviations[0], num_layers):
                return LoadCheck(reason)
            worst, where = max(self._judged(), key=lambda judged: judged[0])
            error, moved = self._run_freely()
        except FlashUnsupported as e:
            return LoadCheck(f"--attention cannot be what it is: {e}", "--attention triton and sdpa take any model")
        except Exception as e:  # whatever a family's own code raises
            if _is_ours(e):
                raise
            return LoadCheck(f"its forward pass fails with our attention ({_brief(e)})")
        bound, bound_of_logits = ALLOWED[self.plain[0].dtype], ALLOWED_OF_LOGITS * moved
        reason = None
        if not worst <= bound:
            size = f"by {worst:.2g} times what rounding does (allowed: {bound:g})"
            reason = f"it differs from plain transformers in {where}, {size}"
        elif not error <= bound_of_logits:
            size = f"by {error:.2g} of the logits' spread (allowed: {bound_of_logits:.2g})"
            reason = f"a packed run differs from a plain one {size}"
        advice = TRY_ANOTHER_DTYPE if self.attend is paged_attention else TRY_OTHERS
        return LoadCheck(reason, advice, worst, error, dict(self.cache.shapes), self.forward, self.attend)

    def _steps(self) -> Iterator[tuple[Work, ...]]:
        scratch = Scratch(self.cache)
        sequences = [
            scratch.sequence([0] * plain.past_tokens + plain.tokens, plain.past_tokens, key=str(i))
            for i, plain in enumerate(self.plain)
        ]
        for piece in range(max(len(plain.stops) for plain in self.plain)):
            yield tuple(
                scratch.next(sequence, plain.past_tokens + plain.stops[piece] - sequence.table.length)
                for sequence, plain in zip(sequences, self.plain, strict=True)
                if piece < len(plain.stops)
            )

    def _forward(self, step: PackedStep, exchange: Exchange) -> torch.Tensor:
        """The logits of a step whose values are exchanged."""
        with layer_inputs(self.layers, exchange) if self.layers is not None else nullcontext():
            return run_packed(step, self.cache, self.forward, self.attend, exchange)

    def _rows(self, order: Sequence[Work]) -> list[tuple[int, int, int]]:
        """Of work items, in order: which sequence, and which of its own tokens."""
        found = []
        for item in order:
            i = int(item.sequence.key)
            start = item.start - self.plain[i].past_tokens
            found.append((i, start, start + item.count))
        return found

    def _store_past(self) -> None:
        first = next(self._steps())
        for item, plain in zip(first, self.plain, strict=True):
            slots = item.sequence.table.slots(0, plain.past_tokens)
            for layer, (keys, values) in plain.past.items():
                shape = LayerShape(keys.shape[1], keys.shape[2], values.shape[2], keys.dtype, keys.device)
                for pool, new in zip(self.cache.pools(layer, shape), (keys, values), strict=True):
                    pool.view(-1, *pool.shape[2:])[torch.tensor(slots, device=pool.device)] = new

    def _run_place_by_place(self) -> None:
        """Give every place the plain run's values, and note how far what was found there lies from them."""
        for work in self._steps():
            step = pack(work, self.cache.block_size, self.device)
            rows = self._rows(step.order)

            def exchange(what: str, layer: int, found: torch.Tensor, rows: Any = rows) -> torch.Tensor:
                parts = found[0].split([stop - start for _, start, stop in rows])
                for (i, start, stop), part in zip(rows, parts, strict=True):
                    self._note(i, (what, layer), range(start, stop), part)
                return torch.cat([self.plain[i].values[what, layer][a:b] for i, a, b in rows])[None]

            logits = self._forward(step, exchange)
            place = LOGITS, len(self.layers or ())
            for (i, _, stop), row in zip(rows, logits, strict=True):
                at = list(self.plain[i].stops).index(stop)
                self._note(i, place, range(at, at + 1), row[None])

    def _note(self, i: int, place: Place, tokens: range, found: torch.Tensor) -> None:
        plain, part = self.plain[i], slice(tokens.start, tokens.stop)
        known = self.deviations[i].setdefault(place, torch.zeros(len(plain.values[place])))
        known[part] = deviation(found.flatten(1), plain.values[place][part].flatten(1), plain.scale[place][part]).cpu()

    def _judged(self) -> Iterator[tuple[float, str]]:
        """How far off each layer and each token is, and its name."""
        for deviations in self.deviations:
            for kind in dict.fromkeys(what for what, _ in deviations):
                layers = [layer for what, layer in deviations if what == kind]
                table = torch.stack([deviations[kind, layer] for layer in layers])  # [layers, tokens]
                of_layers, of_tokens = _usual(table, 1), _usual(table, 0)
                yield float(of_layers.max()), f"the {kind} of layer {layers[int(of_layers.argmax())]}"
                yield float(of_tokens.max()), f"the {kind} at token {int(of_tokens.argmax())}"

    def _run_freely(self) -> tuple[float, float]:
        """How far the logits of a run as it will be lie from the plain ones, and how far rounding moves them.

        Both are root mean squares over the vocabulary, relative to the logits' spread: the median of the rows that
        sample, and the largest of them.
        """
        runner = ModelRunner(self.forward, self.cache, self.device, self.attend)
        generator = torch.Generator().manual_seed(1)

        def exchange(what: str, layer: int, found: torch.Tensor) -> torch.Tensor:
            return jitter(found, generator)

        errors, moved = [], []
        for work in self._steps():
            logits, order = runner.run(SchedulerOutput(work, ()))
            logits = widened(logits).clone()
            step = pack(work, self.cache.block_size, self.device)
            others = widened(self._forward(step, exchange))
            again = {item.sequence.key: row for item, row in zip(step.order, others, strict=True)}
            for (i, _, stop), item, row in zip(self._rows(order), order, logits, strict=True):
                plain = widened(self.plain[i].logits()[list(self.plain[i].stops).index(stop)])
                spread = plain.std()
                errors.append(float((row - plain).square().mean().sqrt() / spread))
                moved.append(float((row - again[item.sequence.key]).square().mean().sqrt() / spread))
        return sorted(errors)[len(errors) // 2], max(moved)


def _usual(table: torch.Tensor, dim: int) -> torch.Tensor:
    """What all but the exceptions stay below."""
    return table.quantile(1 - EXCEPTIONS, dim=dim, interpolation="lower")
