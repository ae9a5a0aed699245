"""What other workers sent for a leaf of a plan, kept as it came, until DataFusion reads it in the leaf's place."""

import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import TypeAlias

import pyarrow as pa

from worker import plan_proto
from worker.cluster.footer import Block, footer
from worker.encoding.dictionaries import has_dictionaries
from worker.errors import ExecutionFailed
from worker.message import (
    BYTE,
    CONTINUATION,
    HEADER_SLOT,
    LENGTH,
    LONG,
    PREFIX_BYTES,
    Bytes,
    HeaderType,
    body_length,
    field,
    header_type,
    number,
    root,
    target,
)

Part: TypeAlias = Bytes | memoryview

# So much goes into the plan itself, more into files. Each of those costs 0.2 ms, in threads; a megabyte in a plan costs
# 0.3 ms, and twice that to decompress, with the GIL held.
INLINE = 256 * 1024

# Bodies begin at multiples of this where DataFusion reads them, so that it need not copy decimals and views.
_ALIGNMENT = 16

# The "IPC File Format" and the end marker of Arrow's ``Columnar.rst``.
_MAGIC = b"ARROW1"
_FILE_START = _MAGIC + bytes(2)
_END = CONTINUATION + bytes(LENGTH.size)

# Linux's ``IOV_MAX``.
_PARTS_AT_ONCE = 1024

# Slots of ``DictionaryBatch`` (Arrow's ``Message.fbs``).
_ID_SLOT = 4
_IS_DELTA_SLOT = 8


class Received:
    """What came for one network leaf: the IPC messages of each of its partitions, in files once they are many.

    Messages of one partition and source stay in their order. One thread may ``flush`` while another calls ``add``.

    Arrow's files have one dictionary for an id, so what comes after a new one goes into another file, with those that
    have not changed. Each stays in memory until another takes its place, and is not counted as held.
    """

    def __init__(self, schema: plan_proto.Message, partitions: int, folder: Path, name: str) -> None:
        """
        Args:
            schema: the leaf's, a ``datafusion_common.Schema``.
            partitions: how many the leaf has.
            folder: made when it is needed, and the caller's to delete.
            name: what the names of files begin with, unique in the folder.
        """
        self._schema = schema
        self._folder = folder
        self._name = name
        # Sources are told apart only where they must be, since each has dictionaries of its own.
        self._is_apart: bool | None = None
        self._partitions: list[dict[int, _Stream]] = [{} for _ in range(partitions)]
        self.is_in_files = False
        """Whether there is anything that only files can hold."""
        self._lock = Lock()
        self.held = 0
        """Bytes in memory that ``flush`` would write."""
        self.written = 0
        """Bytes in files."""

    def add(self, partition: int, source: int, header: Part, body: Sequence[Part]) -> None:
        """Takes a message, and keeps the body's parts as they are.

        Args:
            partition: of the leaf, counted from 0.
            source: which upstream task sent it; what it sends for a partition begins with a schema message.
            header: the message's metadata, as in ``worker.message.Message``.
            body: parts that make up the body.

        Raises:
            ExecutionFailed: the message is none that may come here.
        """
        header = bytes(header)
        kind = header_type(header)
        if kind == HeaderType.SCHEMA and self._is_apart is None:
            self._is_apart = _has_dictionaries(header)
        streams = self._partitions[partition]
        key = source if self._is_apart else 0
        stream = streams.get(key)
        if kind == HeaderType.SCHEMA:
            if stream is None:
                stream = _Stream(header, f"{self._name}-{partition}-{key}")
                with self._lock:
                    streams[key] = stream
            return
        if stream is None:
            raise ExecutionFailed(f"an upstream task sent a message of type {kind} before the schema")
        message = _Framed(header, body)
        if kind == HeaderType.DICTIONARY_BATCH:
            stream.set_dictionary(header, message)
        elif kind == HeaderType.RECORD_BATCH:
            with self._lock:
                self.held += stream.add_batch(message)
        else:
            raise ExecutionFailed(f"an upstream task sent a message of type {kind} in the midst of record batches")

    def flush(self) -> None:
        """Appends what is held to files; blocks, and is not to be called again before it has returned.

        Raises:
            OSError: it could not be written; what was received is of no use then.
        """
        self.is_in_files = True
        self._folder.mkdir(exist_ok=True)
        with self._lock:
            taken = [(file, file.take()) for streams in self._partitions for file in _files(streams)]
        for file, parts in taken:
            if parts:
                file.write(self._folder, parts)
                with self._lock:
                    self.held -= (size := sum(map(len, parts)))
                    self.written += size

    def finish(self, *, to_files: bool = False) -> None:
        """Makes it ready to be scanned, once, after the last message; blocks where there are files to be written.

        Args:
            to_files: keeps nothing in memory, however little it is: only files can say how they are partitioned.

        Raises:
            OSError: as ``flush`` does.
        """
        # Schema messages number the dictionaries, so messages of sources with different ones make no stream together.
        are_streams = all(len({stream.schema for stream in streams.values()}) < 2 for streams in self._partitions)
        if to_files or self.is_in_files or self.held > INLINE or not are_streams:
            self.held += sum(file.end() for streams in self._partitions for file in _files(streams))
            self.flush()

    def scan(self, store_url: str, partitioning: plan_proto.Message | None) -> plan_proto.Message:
        """The ``PhysicalPlanNode`` that reads it, once it is finished.

        Files have paths relative to the folder, so the session must have it as an object store: with ``exchange://tmp/``
        that is ``session.register_object_store("exchange://", LocalFileSystem(prefix=str(folder)), "tmp")``.

        Args:
            store_url: the object store's, with a slash at its end.
            partitioning: a ``datafusion.Partitioning`` that the scan says that it has. What is in memory cannot say.
        """
        node = plan_proto.PhysicalPlanNode()
        if not self.is_in_files:
            node.memory_scan.schema.CopyFrom(self._schema)
            node.memory_scan.partitions.extend(map(_inline, self._partitions))
            return node
        conf = node.arrow_scan.base_conf
        conf.schema.CopyFrom(self._schema)
        conf.object_store_url = store_url
        # Fields that have to be there. Nothing is known of any column, which has to be said of each.
        conf.constraints.SetInParent()
        for _ in self._schema.columns:
            conf.statistics.column_stats.add()
        conf.statistics.SetInParent()
        if partitioning is not None:
            conf.output_partitioning.CopyFrom(partitioning)
        for streams in self._partitions:
            group = conf.file_groups.add()
            for file in _files(streams):
                group.files.add(path=file.name, size=file.size)
        return node

    def clear(self) -> None:
        """Lets go of what is in memory; it is of no use then."""
        with self._lock:
            self._partitions = []


class _Framed:
    """A message, framed as in IPC streams and files."""

    def __init__(self, header: bytes, body: Sequence[Part] = ()) -> None:
        padding = -(PREFIX_BYTES + len(header)) % _ALIGNMENT
        self.metadata = b"".join((CONTINUATION, LENGTH.pack(len(header) + padding), header, bytes(padding)))
        self.body = body
        self.body_size = sum(map(len, body))
        if self.body_size != body_length(header):
            # DataFusion would read past it, and abort the process.
            raise ExecutionFailed(
                f"an upstream task sent a message of {self.body_size} bytes whose metadata says {body_length(header)}"
            )


class _Stream:
    """What one source sends for one partition, in as many files as it has sets of dictionaries."""

    def __init__(self, schema: bytes, name: str) -> None:
        self.schema = schema
        self.files: list[_File] = []
        self._name = name
        self._dictionaries: dict[int, list[_Framed]] = {}
        self._is_changed = True

    def set_dictionary(self, header: bytes, message: _Framed) -> None:
        batch = target(header, field(header, root(header), HEADER_SLOT))
        id_ = number(header, batch, _ID_SLOT, LONG)
        is_delta = number(header, batch, _IS_DELTA_SLOT, BYTE)
        # An id stays in its place: what is inside of other dictionaries goes before them.
        self._dictionaries[id_] = [*self._dictionaries.get(id_, ()), message] if is_delta else [message]
        self._is_changed = True

    def add_batch(self, message: _Framed) -> int:
        """Returns the bytes that this adds to what is held."""
        added = 0
        if self._is_changed:
            self._is_changed = False
            file = _File(f"{self._name}-{len(self.files)}.arrow", self.schema)
            self.files.append(file)
            for messages in self._dictionaries.values():
                added += sum(file.append(message, file.dictionaries) for message in messages)
        file = self.files[-1]
        return added + file.append(message, file.batches)


class _File:
    """An IPC file, not yet written or in part."""

    def __init__(self, name: str, schema: bytes) -> None:
        self.name = name
        self.schema = schema
        self.dictionaries: list[Block] = []
        self.batches: list[Block] = []
        self.held: list[Part] = []
        self._start = _FILE_START + _Framed(schema).metadata
        self._is_begun = False
        self.size = len(self._start)
        """Bytes of all of it, written or held."""

    def append(self, message: _Framed, blocks: list[Block]) -> int:
        """Holds a message, which becomes one of the blocks; returns its bytes."""
        blocks.append(Block(self.size, len(message.metadata), message.body_size))
        return self._hold(message.metadata, *message.body)

    def end(self) -> int:
        """Holds what goes behind the last message; returns the bytes of that."""
        foot = footer(self.schema, self.dictionaries, self.batches)
        return self._hold(_END, foot, LENGTH.pack(len(foot)), _MAGIC)

    def take(self) -> list[Part]:
        """What is held, which it then is no more."""
        taken, self.held = self.held, []
        return taken

    def write(self, folder: Path, parts: list[Part]) -> None:
        """Appends parts to the file, in as few system calls as there can be."""
        if not self._is_begun:
            parts = [self._start, *parts]
            self._is_begun = True
        file = os.open(folder / self.name, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            for first in range(0, len(parts), _PARTS_AT_ONCE):
                _write(file, parts[first : first + _PARTS_AT_ONCE])
        finally:
            os.close(file)

    def _hold(self, *parts: Part) -> int:
        added = sum(map(len, parts))
        self.held += parts
        self.size += added
        return added


def _files(streams: dict[int, _Stream]) -> Iterator[_File]:
    """What came for one partition."""
    return chain.from_iterable(stream.files for stream in streams.values())


def _inline(streams: dict[int, _Stream]) -> bytes:
    """An IPC stream with what is held of a partition, empty if that is nothing."""
    files = list(_files(streams))
    if not files:
        return b""
    return b"".join([_Framed(files[0].schema).metadata, *(part for file in files for part in file.held), _END])


def _write(file: int, parts: list[Part]) -> None:
    size = sum(map(len, parts))
    written = os.writev(file, parts)
    while written < size:
        # Of a full disk, the next call tells.
        written += os.write(file, memoryview(b"".join(parts))[written:])


def _has_dictionaries(schema: bytes) -> bool:
    try:
        fields = pa.ipc.read_schema(pa.py_buffer(_Framed(schema).metadata))
    except (OSError, pa.ArrowException) as error:
        raise ExecutionFailed(f"an upstream task sent a schema that Arrow cannot read: {error}") from error
    return any(has_dictionaries(field_.type) for field_ in fields)
