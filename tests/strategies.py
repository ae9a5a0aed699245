"""Streams for property-based tests: schemas of nested types, and batches whose arrays are parts of larger ones."""

import decimal
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pyarrow as pa
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

INLINE_BYTES = 12

_INDEX_TYPES = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]
_ZONES = {"s": "UTC", "ms": "Europe/Berlin", "us": "+05:30", "ns": "UTC"}
_NAMES = st.sampled_from(["a", "b", "", "ü", "a.b"])
_METADATA = st.none() | st.dictionaries(st.sampled_from(["k", "", "ü"]), st.sampled_from(["", "v", "ü"]), min_size=1)


def _integers(bits: int, signed: bool = True) -> st.SearchStrategy[int]:
    return st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else st.integers(0, 2**bits - 1)


@dataclass(frozen=True)
class Leaf:
    """A type without children: its values are made of a simpler type of the same layout."""

    type: pa.DataType
    layout: pa.DataType
    values: st.SearchStrategy[Any]


def _leaves() -> Iterator[Leaf]:
    yield Leaf(pa.bool_(), pa.bool_(), st.booleans())
    for type_ in _INDEX_TYPES:
        yield Leaf(type_, type_, _integers(type_.bit_width, pa.types.is_signed_integer(type_)))
    for bits in (16, 32, 64):
        yield Leaf(pa.type_for_alias(f"float{bits}"), pa.type_for_alias(f"uint{bits}"), _integers(bits, signed=False))
    for make, digits in ((pa.decimal32, 9), (pa.decimal64, 18), (pa.decimal128, 38), (pa.decimal256, 76)):
        numbers = st.integers(1 - 10**digits, 10**digits - 1)
        yield Leaf(make(digits, 2), make(digits, 2), numbers.map(_hundredths))
    yield Leaf(pa.date32(), pa.int32(), _integers(32))
    yield Leaf(pa.date64(), pa.int64(), _integers(32).map(lambda day: day * 86_400_000))
    for unit, each in (("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)):
        time = pa.time32(unit) if each <= 10**3 else pa.time64(unit)
        yield Leaf(time, pa.type_for_alias(f"int{time.bit_width}"), st.integers(0, 86_400 * each - 1))
        for type_ in (pa.duration(unit), pa.timestamp(unit), pa.timestamp(unit, _ZONES[unit])):
            yield Leaf(type_, pa.int64(), _integers(64))
    triples = st.tuples(_integers(32), _integers(32), _integers(64))
    yield Leaf(pa.month_day_nano_interval(), pa.month_day_nano_interval(), triples.map(pa.MonthDayNano))
    for type_ in (pa.string(), pa.large_string()):
        yield Leaf(type_, type_, st.text(max_size=20))
    for type_ in (pa.binary(), pa.large_binary()):
        yield Leaf(type_, type_, st.binary(max_size=20))
    for size in (0, 3, 16):
        yield Leaf(pa.binary(size), pa.binary(size), st.binary(min_size=size, max_size=size))


def _hundredths(number: int) -> decimal.Decimal:
    return decimal.Decimal(number).scaleb(-2, decimal.Context(prec=76))


_LEAVES = {leaf.type: leaf for leaf in _leaves()}
_VIEWS = [pa.string_view(), pa.binary_view()]
# Views oftener: the encoder compacts them.
_FLAT: list[pa.DataType] = [pa.null(), pa.uuid(), pa.json_(pa.string()), *_VIEWS * 4, *_LEAVES]
_LISTS = [pa.list_, pa.large_list, pa.list_view, pa.large_list_view]
_NESTED = ["list", "fixed-size list", "struct", "map", "union", "dictionary", "run-end encoded"]


def _can_be_in_dictionary(type_: pa.DataType) -> bool:
    # pyarrow reads neither dictionaries of dictionaries nor of extension types.
    return not pa.types.is_dictionary(type_) and not isinstance(type_, pa.BaseExtensionType)


@st.composite
def _types(draw: st.DrawFn, depth: int = 2) -> pa.DataType:
    if depth == 0 or draw(st.booleans()):
        return draw(st.sampled_from(_FLAT))
    inner, fields = _types(depth - 1), _fields(depth - 1)
    match draw(st.sampled_from(_NESTED)):
        case "list":
            return draw(st.sampled_from(_LISTS))(draw(fields))
        case "fixed-size list":
            return pa.list_(draw(fields), draw(st.integers(0, 3)))
        case "struct":
            return pa.struct(draw(st.lists(fields, max_size=3)))
        case "map":
            return pa.map_(draw(st.sampled_from([pa.string(), pa.int8()])), draw(inner))
        case "union":
            children, first = draw(st.lists(fields, min_size=1, max_size=3)), draw(st.sampled_from([0, 5]))
            codes = [first + index for index in range(len(children))]
            return pa.union(children, draw(st.sampled_from(["sparse", "dense"])), type_codes=codes)
        case "dictionary":
            return pa.dictionary(
                draw(st.sampled_from(_INDEX_TYPES)),
                draw(inner.filter(_can_be_in_dictionary)),
                ordered=draw(st.booleans()),
            )
        case _:
            # pyarrow takes no runs of runs from DataFusion.
            values = draw(inner.filter(lambda type_: not pa.types.is_run_end_encoded(type_)))
            return pa.run_end_encoded(draw(st.sampled_from([pa.int16(), pa.int32(), pa.int64()])), values)


@st.composite
def _fields(draw: st.DrawFn, depth: int = 2) -> pa.Field:
    type_ = draw(_types(depth))
    nullable = pa.types.is_null(type_) or draw(st.booleans())
    return pa.field(draw(_NAMES), type_, nullable, draw(_METADATA))


class _Maker:
    """Makes the arrays of one stream, which may be parts of the same memory, and have dictionaries in common."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw
        self._wholes: dict[tuple[pa.DataType, bool], list[pa.Array]] = {}
        self._dictionaries: dict[pa.DataType, list[pa.Array]] = {}

    def array(self, type_: pa.DataType, length: int, nullable: bool) -> pa.Array:
        """A part of an array that is longer."""
        wholes = self._wholes.setdefault((type_, nullable), [])
        known = [whole for whole in wholes if len(whole) >= length]
        is_part_of_known = self._draw(st.booleans())
        if known and is_part_of_known:
            whole = self._draw(st.sampled_from(known))
        else:
            whole = self._whole(type_, length + self._draw(st.integers(0, 5)), nullable)
            wholes.append(whole)
        return whole.slice(self._draw(st.integers(0, len(whole) - length)), length)

    def _whole(self, type_: pa.DataType, length: int, nullable: bool) -> pa.Array:
        if pa.types.is_null(type_):
            return pa.nulls(length)
        if isinstance(type_, pa.BaseExtensionType):
            return pa.ExtensionArray.from_storage(type_, self._whole(type_.storage_type, length, nullable))
        if leaf := _LEAVES.get(type_):
            values = self._list(leaf.values | st.none() if nullable else leaf.values, length)
            array = pa.array(values, leaf.layout)
            return array if leaf.layout == type_ else array.view(type_)
        if pa.types.is_dictionary(type_):
            return self._dictionary(type_, length, nullable)
        if pa.types.is_run_end_encoded(type_):
            lengths = self._list(st.integers(1, 3), length)
            ends = pa.array(accumulate(lengths), type_.run_end_type)
            runs = pa.RunEndEncodedArray.from_arrays(ends, self.array(type_.value_type, length, nullable))
            return runs.slice(0, length)
        if pa.types.is_union(type_):
            return self._union(type_, length)
        buffers, children = self._layout(type_, length)
        return pa.Array.from_buffers(type_, length, [self._validity(length, nullable), *buffers], children=children)

    def _layout(self, type_: pa.DataType, length: int) -> tuple[list[pa.Buffer], list[pa.Array]]:
        """The buffers after the validity bitmap, and the children."""
        if type_ in _VIEWS:
            return self._views(length), []
        if pa.types.is_struct(type_):
            return [], [self._child(type_.field(index), length) for index in range(type_.num_fields)]
        if pa.types.is_fixed_size_list(type_):
            return [], [self._child(type_.value_field, length * type_.list_size)]
        large = pa.types.is_large_list(type_) or pa.types.is_large_list_view(type_)
        offset_type = pa.int64() if large else pa.int32()
        if pa.types.is_list_view(type_) or pa.types.is_large_list_view(type_):
            size = self._draw(st.integers(0, 5))
            offsets = self._list(st.integers(0, size), length)
            sizes = [self._draw(st.integers(0, size - offset)) for offset in offsets]
            return [_buffer(offsets, offset_type), _buffer(sizes, offset_type)], [self._child(type_.value_field, size)]
        first = self._draw(st.integers(0, 2))
        offsets = [*accumulate(self._list(st.integers(0, 3), length), initial=first)]
        if pa.types.is_map(type_):
            values = pa.field("entries", pa.struct([type_.key_field, type_.item_field]), nullable=False)
        else:
            values = type_.value_field
        return [_buffer(offsets, offset_type)], [self._child(values, offsets[-1] + self._draw(st.integers(0, 1)))]

    def _views(self, length: int) -> list[pa.Buffer]:
        """Views of parts of some texts: they overlap, and some of the texts are not shown."""
        texts = [text.encode() for text in self._draw(st.lists(st.text("abc", max_size=40), min_size=1, max_size=3))]
        views = b""
        for _ in range(length):
            which = self._draw(st.integers(0, len(texts) - 1))
            start = self._draw(st.integers(0, len(texts[which])))
            seen = texts[which][start : self._draw(st.integers(start, len(texts[which])))]
            if len(seen) <= INLINE_BYTES:
                views += struct.pack("<i12s", len(seen), seen)
            else:
                views += struct.pack("<i4sii", len(seen), seen[:4], which, start)
        return [pa.py_buffer(data) for data in (views, *texts)]

    def _union(self, type_: pa.DataType, length: int) -> pa.Array:
        fields = [type_.field(index) for index in range(type_.num_fields)]
        which = self._list(st.integers(0, len(fields) - 1), length)
        codes = _buffer([type_.type_codes[index] for index in which], pa.int8())
        if type_.mode == "sparse":
            children = [self._child(field, length) for field in fields]
            return pa.Array.from_buffers(type_, length, [None, codes], children=children)
        offsets = [which[:row].count(index) for row, index in enumerate(which)]
        children = [self._child(field, which.count(index)) for index, field in enumerate(fields)]
        buffers = [None, codes, _buffer(offsets, pa.int32())]
        return pa.Array.from_buffers(type_, length, buffers, children=children)

    def _dictionary(self, type_: pa.DataType, length: int, nullable: bool) -> pa.Array:
        known = self._dictionaries.setdefault(type_, [])
        is_known = self._draw(st.booleans())
        if known and is_known:
            dictionary = self._draw(st.sampled_from(known))
        else:
            dictionary = self.array(type_.value_type, self._draw(st.integers(1, 4)), nullable)
            known.append(dictionary)
        index = st.integers(0, len(dictionary) - 1)
        indices = pa.array(self._list(index | st.none() if nullable else index, length), type_.index_type)
        return pa.DictionaryArray.from_arrays(indices, dictionary, ordered=type_.ordered)

    def _child(self, field: pa.Field, length: int) -> pa.Array:
        return self.array(field.type, length, field.nullable)

    def _validity(self, length: int, nullable: bool) -> pa.Buffer | None:
        """A bitmap, or none; there may be one where no null is."""
        if not self._draw(st.booleans()):
            return None
        return pa.array(self._list(st.booleans(), length) if nullable else [True] * length, pa.bool_()).buffers()[1]

    def _list(self, values: st.SearchStrategy[Any], length: int) -> list[Any]:
        return self._draw(st.lists(values, min_size=length, max_size=length))


def _buffer(numbers: Sequence[int], type_: pa.DataType) -> pa.Buffer:
    return pa.array(numbers, type_).buffers()[1]


@st.composite
def streams(draw: st.DrawFn) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """A schema and some batches of it, each of a few rows; some batches are parts of others."""
    schema = pa.schema(draw(st.lists(_fields(), min_size=1, max_size=3)), draw(_METADATA))
    maker = _Maker(draw)
    batches: list[pa.RecordBatch] = []
    for length in draw(st.lists(st.sampled_from(range(7)), min_size=1, max_size=3)):
        arrays = [maker.array(field.type, length, field.nullable) for field in schema]
        batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
        batches.append(batch)
        start = draw(st.integers(0, length))
        batches.append(batch.slice(start, draw(st.integers(0, length - start))))
    return schema, batches


def generated_streams(count: int) -> list[bytes]:
    """Some streams as Arrow IPC: their arrays are no parts of others, which arrow-rs does not see as pyarrow does."""
    found: list[bytes] = []

    @seed(0)
    @settings(
        max_examples=count,
        database=None,
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(streams())
    def collect(stream: tuple[pa.Schema, list[pa.RecordBatch]]) -> None:
        schema, batches = stream
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        found.append(sink.getvalue().to_pybytes())

    collect()
    return found
