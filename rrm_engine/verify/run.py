"""A whole recorded run verified: read it, load its model twice, check node after node."""

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import torch

from rrm_engine.legible import legible_key
from rrm_engine.loading.prepare import LoadedModel, load_model
from rrm_engine.protocol.chat import ChatFormat
from rrm_engine.verify import redraw
from rrm_engine.verify.check import NodeCheck, SettingsOf, check_node
from rrm_engine.verify.grammars import RecordedGrammars
from rrm_engine.verify.recompute import Paged, Plain
from rrm_engine.verify.recording import NodeRecord, Recording, Segment, VerifyError, read_recording
from rrm_engine.verify.redraw import Settings

RUN = "run"  # stands for the run's own dtype
DTYPES = (RUN, "float32")
Report = Callable[[str, int], None]  # (what is being done, tokens that have just been checked)


def verify_run(
    path: str | Path,
    *,
    nodes: Collection[str] = (),
    jobs: Collection[str] = (),
    limit: int | None = None,
    dtypes: Sequence[str] = DTYPES,
    model: str | None = None,
    device: str = "auto",
) -> list[NodeCheck]:
    """Check the nodes of the run in ``path`` against plain transformers; one NodeCheck per node and dtype.

    ``jobs`` (``id/mode/sample``, ``id/mode`` or ``id``), ``nodes`` (paths such as ``root.c1``) and ``limit`` choose
    among the nodes; none of them: all. ``dtypes`` are those in which plain transformers computes, ``run`` the
    run's own: only there something is promised. ``model`` is where the model is now, if it has been moved.

    Raises VerifyError, or ValueError from loading the model, with one sentence that says what to do.
    """
    recording = read_recording(Path(path), nodes, jobs, limit)
    return list(check_all(recording, dtypes, model, device))


def passes(recording: Recording, dtypes: Sequence[str]) -> list[str]:
    """The dtypes of plain transformers, each once."""
    return list(dict.fromkeys(recording.dtype if dtype == RUN else dtype for dtype in dtypes))


def check_all(
    recording: Recording,
    dtypes: Sequence[str] = DTYPES,
    model: str | None = None,
    device: str = "auto",
    report: Report = lambda what, tokens: None,
    trust_remote_code: bool = False,
) -> Iterator[NodeCheck]:
    """The checks of a recording, one after the other; ``report`` is told before loading and after every node."""
    name = model or recording.model
    report(f"loading {name} into the engine, {recording.dtype}", 0)
    loaded = load_model(name, recording.dtype, device, recording.attention, trust_remote_code)
    grammars = RecordedGrammars(recording.max_width, loaded.tokenizer, loaded.eos_ids)
    settings_of = _settings(recording, loaded)
    for dtype in passes(recording, dtypes):
        report(f"loading {name} into plain transformers, {dtype}", 0)
        plain = Plain(name, dtype, loaded.device, trust_remote_code)
        yield from _pass(recording, loaded, plain, grammars, settings_of, report)


def _pass(
    recording: Recording,
    loaded: LoadedModel,
    plain: Plain,
    grammars: RecordedGrammars,
    settings_of: SettingsOf,
    report: Report,
) -> Iterator[NodeCheck]:
    """Every node against ``plain``."""
    paged = Paged(loaded, recording.block_size, recording.step_tokens)
    for record in recording.nodes:
        report(legible_key(record.key), 0)
        _check_vocabulary(record, plain.vocabulary, loaded.name)
        yield check_node(
            record,
            plain.logits(record),
            paged.logits(record),
            seed=recording.seed,
            dtype=loaded.dtype,
            reference=plain.dtype,
            matcher_of=lambda segment: grammars.matcher(segment.phase, segment.grammar),
            settings_of=settings_of,
            decode=plain.text,
        )
        report(legible_key(record.key), len(record.tokens))


def _settings(recording: Recording, loaded: LoadedModel) -> SettingsOf:
    """How the engine drew a segment's tokens, processors made anew."""
    eos_ids = ChatFormat(loaded.tokenizer, loaded.eos_ids).eos_ids
    vocabulary = loaded.vocabulary

    def settings_of(record: NodeRecord, segment: Segment) -> Settings:
        tokens = torch.tensor([record.tokens], device=loaded.device)
        longest = min(segment.start + segment.budget, recording.max_sequence_tokens)
        return redraw.settings_of(segment.sampling, vocabulary, tokens, segment.start, longest, eos_ids)

    return settings_of


def _check_vocabulary(record: NodeRecord, size: int, model: str) -> None:
    for position, token in enumerate(record.tokens):
        if not 0 <= token < size:
            raise VerifyError(
                f"{legible_key(record.key)} has token {token} at position {position}, and the vocabulary of {model} "
                f"ends at {size - 1}: the run was recorded with another model, or its trace was changed"
            )
