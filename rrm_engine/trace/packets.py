"""Perfetto's packets, as far as the export needs them: tracks, slices, instants, counters, flows, annotations."""

from collections.abc import Mapping, Sequence
from typing import Any

from rrm_engine.runs.directory import ESCAPED

Notes = Mapping[str, Any] | None
SEQUENCE = 1  # everything is written by one writer


class Packets:
    """Collects packets in the order of time; packets of one moment stay in the order they were given in."""

    def __init__(self, pb2: Any) -> None:
        """``pb2`` is ``perfetto.protos.perfetto.trace.perfetto_trace_pb2``."""
        self._pb2 = pb2
        self._descriptors: list[Any] = []
        self._events: list[Any] = []
        self._ids = 0
        self._processes = 0

    def new_id(self) -> int:
        """A number for a track or a flow, given once."""
        self._ids += 1
        return self._ids

    def process(self, name: str) -> int:
        """A top-level track."""
        descriptor, track = self._descriptor()
        self._processes += 1
        descriptor.process.pid = self._processes
        descriptor.process.process_name = name
        descriptor.child_ordering = self._pb2.TrackDescriptor.EXPLICIT
        return track

    def track(self, name: str, parent: int, rank: int) -> int:
        """A track below another; siblings are shown by ``rank``."""
        descriptor, track = self._descriptor()
        descriptor.parent_uuid = parent
        descriptor.name = name
        descriptor.child_ordering = self._pb2.TrackDescriptor.EXPLICIT
        descriptor.sibling_order_rank = rank
        return track

    def counter(self, name: str, parent: int) -> int:
        """A counter's track."""
        descriptor, track = self._descriptor()
        descriptor.parent_uuid = parent
        descriptor.name = name
        descriptor.counter.unit = self._pb2.CounterDescriptor.UNIT_COUNT
        return track

    def begin(
        self,
        t: float,
        track: int,
        name: str,
        category: str,
        notes: Notes = None,
        arriving: Sequence[int] = (),
    ) -> None:
        """A slice begins; the flows ``arriving`` end at it."""
        event = self._event(t, track, self._pb2.TrackEvent.TYPE_SLICE_BEGIN, name, category, notes)
        event.terminating_flow_ids.extend(arriving)

    def end(self, t: float, track: int) -> None:
        """The track's innermost slice ends."""
        self._event(t, track, self._pb2.TrackEvent.TYPE_SLICE_END)

    def instant(
        self,
        t: float,
        track: int,
        name: str,
        category: str,
        notes: Notes = None,
        leaving: Sequence[int] = (),
    ) -> None:
        """Something of no length; the flows ``leaving`` begin at it."""
        event = self._event(t, track, self._pb2.TrackEvent.TYPE_INSTANT, name, category, notes)
        event.flow_ids.extend(leaving)

    def count(self, t: float, track: int, value: int) -> None:
        """A counter has a value from here on."""
        self._event(t, track, self._pb2.TrackEvent.TYPE_COUNTER).counter_value = value

    def serialized(self) -> bytes:
        """The whole trace."""
        trace = self._pb2.Trace()
        packets = [*self._descriptors, *sorted(self._events, key=lambda packet: packet.timestamp)]
        if packets:
            packets[0].sequence_flags = self._pb2.TracePacket.SEQ_INCREMENTAL_STATE_CLEARED
        trace.packet.extend(packets)
        return bytes(trace.SerializeToString())

    def _descriptor(self) -> tuple[Any, int]:
        packet, track = self._packet(), self.new_id()
        packet.track_descriptor.uuid = track
        self._descriptors.append(packet)
        return packet.track_descriptor, track

    def _event(self, t: float, track: int, kind: int, name: str = "", category: str = "", notes: Notes = None) -> Any:
        packet = self._packet()
        packet.timestamp = round(t * 1e9)
        event = packet.track_event
        event.track_uuid, event.type = track, kind
        if name:
            event.name = name
            event.categories.append(category)
        for key, value in (notes or {}).items():
            _annotate(event.debug_annotations.add(), key, value)
        self._events.append(packet)
        return event

    def _packet(self) -> Any:
        packet = self._pb2.TracePacket()
        packet.trusted_packet_sequence_id = SEQUENCE
        return packet


def _annotate(note: Any, name: str, value: Any) -> None:
    """A value of JSON as a debug annotation."""
    if name:
        note.name = _whole(name)
    if isinstance(value, bool):
        note.bool_value = value
    elif isinstance(value, int):
        note.int_value = value
    elif isinstance(value, float):
        note.double_value = value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _annotate(note.dict_entries.add(), str(key), inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _annotate(note.array_values.add(), "", inner)
    else:
        note.string_value = "" if value is None else _whole(str(value))


def _whole(text: str) -> str:
    """``text`` without halves of surrogate pairs, which protobuf refuses."""
    return text.encode(errors=ESCAPED).decode()
