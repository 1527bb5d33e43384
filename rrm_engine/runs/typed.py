"""Objects of JSON read as the dataclass or the TypedDict that they should be; what is wrong is told in one sentence."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from functools import cache, partial
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints, is_typeddict

from rrm_engine.legible import legible

WORDS = {
    frozenset({bool}): "true or false",
    frozenset({int}): "a whole number",
    frozenset({int, float}): "a number",
    frozenset({str}): "a text",
    frozenset({list}): "a list",
    frozenset({dict}): "an object",
}
SHOWN = 40  # characters of a wrong value
BITS = 63  # that whole numbers may not reach

Convert = Callable[[Any, str], Any]  # takes a value and what it is called


class WrongShape(ValueError):
    """A JSON value is not what it should be; the message says what of it, in one sentence without its end."""


class Kind(NamedTuple):
    """What a value may be: the types that JSON gives (exactly these: True is no number), and how its inside is read."""

    types: frozenset[type]
    convert: Convert | None = None

    @property
    def words(self) -> str:
        return WORDS[self.types - {NoneType}] + " or null" * (NoneType in self.types)


def read_as(cls: Any, value: dict[str, Any], what: str) -> Any:
    """``value``, which is called ``what``, as an instance of the dataclass ``cls``; ``value`` may be changed.

    Raises WrongShape where a field is missing, unknown, or of another type.
    """
    converts = _converts(cls, tuple(value), tuple(map(type, value.values())))
    if converts is None:
        raise _first_fault(cls, value, what)
    for name, convert in converts:
        value[name] = convert(value[name], f"{name} of {what}")
    return cls(**value)


@cache
def _converts(cls: Any, names: tuple[str, ...], types: tuple[type, ...]) -> list[tuple[str, Convert]] | None:
    """What is left to do for an object with these fields of these types; None if ``cls`` is another. They are few."""
    kinds = _kinds(cls)
    known = all(name in kinds and type_ in kinds[name].types for name, type_ in zip(names, types, strict=True))
    if not known or not set(_required(cls)) <= set(names):
        return None
    found = ((name, kinds[name].convert) for name, type_ in zip(names, types, strict=True) if type_ is not NoneType)
    return [(name, convert) for name, convert in found if convert is not None]


def _first_fault(cls: Any, value: dict[str, Any], what: str) -> WrongShape:
    kinds = _kinds(cls)
    for name, found in value.items():
        if name not in kinds:
            return WrongShape(f"{what} has {legible(ascii(name), SHOWN)}, which this version does not know")
        if type(found) not in kinds[name].types:
            return _wrong(f"{name} of {what}", found, kinds[name].words)
    missing = next(name for name in _required(cls) if name not in value)
    return WrongShape(f"{what} lacks {missing}")


def check_keys(cls: Any, value: dict[str, Any], what: str) -> None:
    """Raise WrongShape unless ``value`` has what the TypedDict ``cls`` asks for; it may have more. Whole numbers must
    fit where they are used: floats, and the columns of data frames."""
    for name in sorted(cls.__required_keys__ - value.keys()):
        raise WrongShape(f"{what} lacks {name}")
    for name, kind in _kinds(cls).items():
        if name in value and type(value[name]) not in kind.types:
            raise _wrong(f"{name} of {what}", value[name], kind.words)
        if type(value.get(name)) is int and value[name].bit_length() >= BITS:
            raise WrongShape(f"{name} of {what} has {BITS} bits or more")
        if kind.convert is not None and value.get(name) is not None:
            kind.convert(value[name], f"{name} of {what}")


def _wrong(what: str, found: Any, wanted: str) -> WrongShape:
    return WrongShape(f"{what} is {legible(ascii(found), SHOWN)}, not {wanted}")


def types_of(cls: Any) -> dict[str, frozenset[type]]:
    """By field of a dataclass or TypedDict the types that JSON gives for it."""
    return {name: kind.types for name, kind in _kinds(cls).items()}


@cache
def _kinds(cls: Any) -> dict[str, Kind]:
    hints = get_type_hints(cls)
    names = [f.name for f in fields(cls)] if is_dataclass(cls) else list(hints)
    return {name: _kind(hints[name]) for name in names}


@cache
def _required(cls: Any) -> tuple[str, ...]:
    return tuple(f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING)


def _kind(hint: Any) -> Kind:
    """How a field with that type is read."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        (kind,) = (_kind(part) for part in parts if part is not NoneType)
        return Kind(kind.types | {NoneType}, kind.convert)
    if origin is tuple and ... not in parts:
        return Kind(frozenset({list}), partial(_tuple, [_kind(part) for part in parts]))
    if origin in (list, tuple):
        return Kind(frozenset({list}), partial(_items, origin, _kind(parts[0])))
    if origin in (dict, Mapping) or hint is dict:
        of = parts[1] if parts else Any
        return Kind(frozenset({dict}), None if of is Any else partial(_values, _kind(of)))
    if is_typeddict(hint):
        return Kind(frozenset({dict}), partial(_checked, hint))
    if is_dataclass(hint):
        return Kind(frozenset({dict}), partial(read_as, hint))
    if issubclass(hint, StrEnum):
        return Kind(frozenset({str}), partial(_member, hint))
    return Kind(frozenset({int, float} if hint is float else {hint}))


def _items(container: type, kind: Kind, values: list[Any], what: str) -> Any:
    if not set(map(type, values)) <= kind.types:
        wrong = next(value for value in values if type(value) not in kind.types)
        raise _wrong(f"an entry in {what}", wrong, kind.words)
    if kind.convert is not None:
        values = [kind.convert(value, f"an entry in {what}") for value in values]
    return values if container is list else container(values)


def _values(kind: Kind, value: dict[str, Any], what: str) -> dict[str, Any]:
    _items(list, kind, list(value.values()), what)
    return value


def _checked(cls: Any, value: dict[str, Any], what: str) -> dict[str, Any]:
    check_keys(cls, value, what)
    return value


def _tuple(kinds: Sequence[Kind], values: list[Any], what: str) -> tuple[Any, ...]:
    if len(values) != len(kinds) or any(type(v) not in k.types for v, k in zip(values, kinds, strict=True)):
        raise _wrong(what, values, f"{len(kinds)} values: {', '.join(kind.words for kind in kinds)}")
    return tuple(values)


def _member(enum: type[StrEnum], value: str, what: str) -> StrEnum:
    try:
        return enum(value)
    except ValueError:
        raise _wrong(what, value, f"one of {', '.join(enum)}") from None
