"""What came for one leaf of a plan: Arrow IPC messages, undecoded, a few in memory and more in files.

A scan of files costs a third to a fifth of a plan that has the same inside, and DataFusion reads them without the GIL.
"""

import os
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from worker import plan_proto
from worker.cluster.footer import END_OF_STREAM, START, Block, footer
from worker.message import CONTINUATION, LENGTH, Bytes, HeaderType, header_type
from worker.plan_proto import Message as PlanMessage

# So much may stand in the plan itself.
INLINE_BYTES = 64 * 1024

# ``os.writev`` takes no more parts.
MAX_PARTS = 1024


@dataclass(slots=True)
class Held:
    """Messages that are in memory, in the order in which they came."""

    size: int = 0
    messages: "dict[_Stream, list[tuple[bytes, list[Bytes]]]]" = field(default_factory=dict)


class Received:
    """The messages of the partitions of one leaf."""

    def __init__(self, schema: PlanMessage, partitions: int, folder: Path, name: str) -> None:
        """
        Args:
            schema: the leaf's ``datafusion_common.Schema``.
            partitions: how many the leaf has.
            folder: where files are made; it exists.
            name: how the names of the files begin.
        """
        self._schema = schema
        self._folder = folder
        self._name = name
        self._keeps_sources_apart = _has_dictionaries(schema)
        self._partitions: list[dict[Hashable, _Stream]] = [{} for _ in range(partitions)]
        self._held = Held()
        self._in_files = False

    @property
    def held(self) -> int:
        """Bytes in memory."""
        return self._held.size

    def add(self, partition: int, source: int, header: Bytes | memoryview, body: "list[Bytes | memoryview]") -> None:
        """Adds a message, uncopied. Those of a source come in its order, its schema first.

        Args:
            partition: of the leaf.
            source: which of the tasks that it reads from.
            header: the metadata.
            body: parts that make up the body.
        """
        # A dictionary is for the batches that come after it from the same source.
        key = source if self._keeps_sources_apart else None
        streams = self._partitions[partition]
        header = bytes(header)
        if header_type(header) == HeaderType.SCHEMA:
            if key not in streams:
                streams[key] = _Stream(header, f"{self._name}-{partition}-{source}")
            return
        held = self._held
        held.size += len(header) + sum(map(len, body))
        held.messages.setdefault(streams[key], []).append((header, body))

    def take(self) -> Held:
        """Takes what is held, to be written, before anything else that is taken."""
        taken, self._held = self._held, Held()
        self._in_files = True
        return taken

    def write(self, taken: Held) -> None:
        """Writes what was taken to files. Blocks."""
        for stream, messages in taken.messages.items():
            stream.write(self._folder, messages)

    def finish(self) -> None:
        """Ends the files. Blocks."""
        for stream in self._streams():
            stream.finish(self._folder)

    def fits_inline(self) -> bool:
        """Whether everything that came is little enough to stand in the plan itself; if not, it goes to files."""
        return not self._in_files and self.held <= INLINE_BYTES and not self._keeps_sources_apart

    def inline(self) -> PlanMessage:
        """A scan of what is held."""
        node = plan_proto.PhysicalPlanNode()
        node.memory_scan.schema.CopyFrom(self._schema)
        for streams in self._partitions:
            parts: list[Bytes | memoryview] = []
            for stream in streams.values():
                if messages := self._held.messages.get(stream):
                    parts += _framed(stream.schema, [])
                    for header, body in messages:
                        parts += _framed(header, body)
                    parts.append(END_OF_STREAM)
            node.memory_scan.partitions.append(b"".join(parts))
        return node

    def scan(self, store_url: str, partitioning: PlanMessage | None) -> PlanMessage:
        """A scan of the files, which have to be finished.

        Args:
            store_url: of an object store whose root is the folder.
            partitioning: what the plan is told of how rows are distributed over the partitions.
        """
        node = plan_proto.PhysicalPlanNode()
        scan = node.arrow_scan.base_conf
        scan.schema.CopyFrom(self._schema)
        scan.object_store_url = store_url
        scan.constraints.SetInParent()
        scan.statistics.SetInParent()
        for precision in (scan.statistics.num_rows, scan.statistics.total_byte_size):
            precision.precision_info = plan_proto.PRECISIONS["ABSENT"]
        for _ in self._schema.columns:
            column = scan.statistics.column_stats.add()
            for precision in (column.null_count, column.distinct_count):
                precision.precision_info = plan_proto.PRECISIONS["ABSENT"]
        if partitioning is not None and partitioning.HasField("hash"):
            scan.output_partitioning.CopyFrom(partitioning)
        for streams in self._partitions:
            group = scan.file_groups.add()
            for stream in streams.values():
                for name, size in stream.files:
                    group.files.add(path=name, size=size)
        return node

    def _streams(self) -> "Iterator[_Stream]":
        for streams in self._partitions:
            yield from streams.values()


class _Stream:
    """Messages of a partition that follow each other in a file."""

    def __init__(self, schema: bytes, name: str) -> None:
        self.schema = schema
        self.files: list[tuple[str, int]] = []
        """Names and sizes, the last not ended yet."""
        self._name = name
        self._size = 0
        self._dictionaries: list[Block] = []
        self._batches: list[Block] = []

    def write(self, folder: Path, messages: "list[tuple[bytes, list[Bytes]]]") -> None:
        parts: list[Bytes | memoryview] = []
        for header, body in messages:
            kind = header_type(header)
            if kind == HeaderType.DICTIONARY_BATCH and self._batches:
                # A file has one dictionary for all its batches.
                self._append(folder, parts)
                self.finish(folder)
                parts = []
            if not self._size:
                self.files.append((f"{self._name}-{len(self.files)}.arrow", 0))
                parts += [START, *_framed(self.schema, [])]
                self._size = sum(map(len, parts))
            framed = _framed(header, body)
            size = sum(map(len, body))
            length = sum(map(len, framed)) - size
            blocks = self._dictionaries if kind == HeaderType.DICTIONARY_BATCH else self._batches
            blocks.append(Block(self._size, length, size))
            self._size += length + size
            parts += framed
        self._append(folder, parts)

    def finish(self, folder: Path) -> None:
        """Ends the file that is being written."""
        if not self._size:
            return
        end = footer(self.schema, self._dictionaries, self._batches)
        self._append(folder, [end])
        self.files[-1] = (self.files[-1][0], self._size + len(end))
        self._size, self._dictionaries, self._batches = 0, [], []

    def _append(self, folder: Path, parts: "list[Bytes | memoryview]") -> None:
        if not parts:
            return
        # Descriptors are few, partitions may be many.
        with open(folder / self.files[-1][0], "ab", buffering=0) as file:
            for first in range(0, len(parts), MAX_PARTS):
                chunk = [memoryview(part).cast("B") for part in parts[first : first + MAX_PARTS]]
                while chunk:
                    written = os.writev(file.fileno(), chunk)
                    while chunk and written >= len(chunk[0]):
                        written -= len(chunk.pop(0))
                    if written:
                        chunk[0] = chunk[0][written:]


def _framed(header: bytes, body: "list[Bytes]") -> "list[Bytes]":
    """A message as streams and files have it: its metadata filled up to eight bytes."""
    padding = -len(header) % 8
    return [CONTINUATION, LENGTH.pack(len(header) + padding), header + bytes(padding), *body]


def _has_dictionaries(message: PlanMessage) -> bool:
    """Whether a schema, or a part of one, has a type that is a dictionary."""
    if message.DESCRIPTOR.full_name == "datafusion_common.Dictionary":
        return True
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None:
            parts = [value] if hasattr(value, "DESCRIPTOR") else value
            if any(hasattr(part, "DESCRIPTOR") and _has_dictionaries(part) for part in parts):
                return True
    return False
