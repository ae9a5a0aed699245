"""What plans may touch: files, object stores, other workers. Found in a plan before DataFusion decodes it.

Decoding looks at files already, where a plan writes; so nothing is decoded that is not allowed.
"""

import asyncio
import inspect
import os
import re
import stat
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias
from urllib.parse import unquote, urlsplit

from google.protobuf.message import DecodeError
from pydantic import ValidationError
from pydantic_core import Url

from worker import plan, plan_proto
from worker.config import Settings, is_loopback
from worker.errors import InvalidPlan, PermissionDenied
from worker.plan_proto import Message
from worker.proto import nodes_pb2
from worker.session import WorkerQueryContext

# The store of the local file system, which every session has.
FILES = "file://"

# The stores of what a task has read from other workers: its own session has one, and no plan is to name it.
EXCHANGE = "exchange://"

# A store's URL as planners write it. Readers of URLs take more for one: spaces before it, tabs and backslashes in it.
_STORE_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#\\\s]*/?")
_OUTPUT_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^/?#\\\s]*)/([^?#\\\x00-\x1f]*)")

# File systems of the kernel's: there are secrets of processes among their files, which say that they are regular ones.
_KERNEL_FOLDERS = ("/proc", "/sys")

# File systems may take their time. Those of so many requests do so at the same time.
_THREADS = 4

_NETWORK = frozenset({"shuffle", "coalesce", "network_broadcast"})


class Touched(NamedTuple):
    """Something that a node reads or writes."""

    node: str
    """The kind of the node, such as ``parquet_scan``."""
    store: str
    """Scheme and authority of the object store's URL, such as ``s3://bucket``; ``file://`` for local files."""
    path: str
    """Where it is in the store, without a slash before it, and as it is: nothing in it is percent-encoded."""

    def __str__(self) -> str:
        return f"{self.store}/{self.path}"


@dataclass(frozen=True, slots=True)
class PlanAccess:
    """What a plan touches, as far as its own nodes say; those of a session's codecs may touch anything."""

    nodes: frozenset[str]
    """Kinds of nodes by DataFusion's names, such as ``hash_join``. Those that only codecs know are ``extension``; those
    of Distributed DataFusion are that too, and have names such as ``shuffle``."""
    reads: tuple[Touched, ...]
    writes: tuple[Touched, ...]
    workers: frozenset[str]
    """URLs of the workers that it reads from, to which the request's headers go."""
    functions: frozenset[str]
    """Names of the functions that it calls, ``sum`` too."""
    inlined_functions: frozenset[str]
    """Names of those that come inside of it, pickled. They run only if the session builder says so."""


class PlanPolicy(Protocol):
    """What decides for every request whether its plan may be executed."""

    async def check(self, ctx: WorkerQueryContext, access: PlanAccess) -> None:
        """Returns if it may. Raise ``worker.PermissionDenied`` and its like.

        Args:
            ctx: the request, as the session builder has left it: with its headers, principal, and builder.
            access: what the plan touches.
        """
        ...


PlanPolicyLike: TypeAlias = PlanPolicy | Callable[[WorkerQueryContext, PlanAccess], Awaitable[None]]
Check: TypeAlias = Callable[[WorkerQueryContext, PlanAccess], Awaitable[None]]


def check_of(policy: PlanPolicyLike) -> Check:
    """The function of anything that may be a policy.

    Raises:
        TypeError: it is neither an asynchronous function nor an object with such a method ``check``.
    """
    check: Any = getattr(policy, "check", policy)
    if isinstance(policy, type) or not inspect.iscoroutinefunction(check):
        raise TypeError(
            f"{policy!r} is no plan policy: an 'async def' of a WorkerQueryContext and a PlanAccess, "
            "or an object with such a method 'check', is right"
        )
    asynchronous: Check = check
    return asynchronous


class DefaultPolicy:
    """Allows what the settings allow.

    Files are looked at before they are opened: who may change folders under one that is allowed (a symbolic link in the
    place of a file, at the right time) may read what the worker can.
    """

    def __init__(self, settings: Settings) -> None:
        """
        Args:
            settings: of which ``allow_path``, ``allow_writes``, ``host`` and ``cluster_workers`` count.
        """
        self._is_local = is_loopback(settings.host)
        self._folders = settings.allow_path
        self._allow_writes = settings.allow_writes
        self._workers = frozenset(map(_address, settings.cluster_workers))
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="worker-policy")

    async def check(self, ctx: WorkerQueryContext, access: PlanAccess) -> None:
        """Returns if the settings allow everything that a plan touches.

        Raises:
            PermissionDenied: they do not; the text names the setting that would.
        """
        for written in access.writes if not self._allow_writes else ():
            raise PermissionDenied(
                f"the plan's {written.node} writes {str(written)!r}: this worker writes nothing, --allow-writes lets it"
            )
        if not self._is_local and self._workers:
            for url in sorted(access.workers):
                if _address(url) not in self._workers:
                    raise PermissionDenied(
                        f"the plan reads from {url!r}: this worker reads from those alone that --cluster-workers names"
                    )
        # Whoever registers a store of their own for files has said what is in it.
        if FILES in ctx.builder.object_stores:
            return
        touched = [one for one in (*access.reads, *access.writes) if one.store == FILES]
        if touched and not self._is_local and not self._folders:
            raise PermissionDenied(
                f"the plan's {touched[0].node} names {str(touched[0])!r}: this worker listens for other machines, "
                "where it touches only files in folders that --allow-path names"
            )
        if touched:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._check_files, touched)

    def _check_files(self, touched: Iterable[Touched]) -> None:
        """Blocks for 5 to 20 µs a file."""
        resolved = [os.path.realpath(folder) for folder in self._folders]
        named = [*resolved, *map(os.path.abspath, self._folders)]
        folders: dict[str, str] = {}
        for one in touched:
            path = os.path.normpath(f"/{one.path}")
            # What is not even called so is not looked at: that may take long, and how long tells what is there.
            is_allowed = not named or _is_under_one_of(named, path)
            if is_allowed:
                path, mode = _resolved(path, folders)
                is_allowed = not resolved or _is_under_one_of(resolved, path)
            if not is_allowed:
                raise PermissionDenied(
                    f"the plan's {one.node} names {str(one)!r}: this worker touches only files in folders that "
                    "--allow-path names"
                )
            is_special = mode and not stat.S_ISREG(mode) and not (stat.S_ISDIR(mode) and one.node in plan_proto.SINKS)
            if is_special or _is_under_one_of(_KERNEL_FOLDERS, path):
                raise PermissionDenied(f"the plan's {one.node} names {str(one)!r}, which is no regular file")


def _resolved(path: str, folders: dict[str, str]) -> tuple[str, int]:
    """Where a path leads to, and the mode of what is there, 0 if that is nothing or cannot be told.

    Files are many and folders few: those are kept.
    """
    folder, _, name = path.rpartition("/")
    try:
        if folder not in folders:
            folders[folder] = os.path.realpath(folder or "/")
        path = os.path.join(folders[folder], name)
        mode = os.lstat(path).st_mode
        # A link of the kernel's leads to what is open, by whatever name that has, or had before it was deleted.
        if stat.S_ISLNK(mode) and not _is_under_one_of(_KERNEL_FOLDERS, path):
            path = os.path.realpath(path)
            mode = os.stat(path).st_mode
        return path, mode
    except (OSError, ValueError):
        return os.path.normpath(path), 0


def _is_under_one_of(folders: Iterable[str], path: str) -> bool:
    return any(path == folder or path.startswith(folder.rstrip("/") + "/") for folder in folders)


def _address(url: str) -> tuple[str, str | None, int | None]:
    """A worker's URL without what makes no difference."""
    try:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return url, None, None


def access_of(plan_bytes: bytes, *, with_functions: bool) -> PlanAccess:
    """What a plan touches. Takes 0.1 ms for one of TPC-H, five times that with functions.

    Args:
        plan_bytes: a ``datafusion.PhysicalPlanNode``.
        with_functions: whether the functions are wanted, which are deep inside of it.

    Raises:
        InvalidPlan: the bytes are no plan, or the URL of a store is none.
        PermissionDenied: it names a store that is the worker's own.
    """
    message = plan_proto.parse(plan_bytes)
    nodes: set[str] = set()
    workers: set[str] = set()
    reads: dict[Touched, None] = {}
    writes: dict[Touched, None] = {}
    for node in plan_proto.nodes(message):
        kind = plan_proto.kind(node) or "unknown"
        if kind in plan_proto.FILE_SCANS:
            reads.update(dict.fromkeys(_scanned(kind, getattr(node, kind).base_conf)))
        elif kind in plan_proto.SINKS:
            writes.update(dict.fromkeys(_written(kind, getattr(node, kind).sink.config)))
        elif kind == "extension" and (distributed := _distributed(node)) is not None:
            name = distributed.WhichOneof("node")
            if name is not None:
                nodes.add(name)
            if name in _NETWORK:
                workers |= {task.url_str for task in getattr(distributed, name).input_stage.tasks}
        nodes.add(kind)
    functions = list(plan_proto.functions(message)) if with_functions else []
    return PlanAccess(
        nodes=frozenset(nodes),
        reads=tuple(reads),
        writes=tuple(writes),
        workers=frozenset(workers),
        functions=frozenset(map(plan_proto.function_name, functions)),
        inlined_functions=frozenset(
            plan_proto.function_name(function)
            for function in functions
            if function.fun_definition.startswith(plan.PYTHON_UDF_PREFIX)
        ),
    )


def _scanned(kind: str, conf: Message) -> Iterator[Touched]:
    store = _store(kind, conf.object_store_url)
    for group in conf.file_groups:
        for file in group.files:
            # DataFusion takes one slash off each end, refuses more, and takes the rest as it is.
            yield Touched(kind, store, file.path.strip("/"))


def _written(kind: str, conf: Message) -> Iterator[Touched]:
    store = _store(kind, conf.object_store_url)
    for url in conf.table_paths:
        parsed = _OUTPUT_URL.fullmatch(url)
        path = unquote(parsed[2]).strip("/") if parsed else ""
        if parsed is None or _store(kind, parsed[1]) != store or not {"", ".", ".."}.isdisjoint(path.split("/")):
            raise InvalidPlan(f"the plan's {kind} writes to {url!r}: a URL such as 'file:///folder/name' is right")
        yield Touched(kind, store, path)


def _store(kind: str, url: str) -> str:
    """Scheme and authority of a store's URL, as DataFusion looks it up; nothing is the local file system."""
    if _STORE_URL.fullmatch(url or FILES) is None:
        raise _no_store(kind, url)
    try:
        parsed = Url(url or FILES)
    except ValidationError as error:
        raise _no_store(kind, url) from error
    # It is DataFusion's parser too: the hosts of some schemes are written in many ways. And names of users, which
    # DataFusion takes no notice of, would hide the host from a policy that looks at how the URL begins.
    authority = str(parsed).partition("://")[2].partition("/")[0].rpartition("@")[2]
    # There is one local file system, whatever host is written there.
    store = FILES if parsed.scheme == "file" else f"{parsed.scheme}://{authority}"
    if store.startswith(EXCHANGE):
        raise PermissionDenied(f"the plan's {kind} names {url!r}: what workers send each other is not for plans")
    return store


def _no_store(kind: str, url: str) -> InvalidPlan:
    return InvalidPlan(f"the plan's {kind} has the object store {url!r}: a URL such as 's3://bucket/' is right")


def _distributed(node: Message) -> nodes_pb2.Node | None:
    """What a node is if it is one of Distributed DataFusion's, as the worker reads those."""
    try:
        encoded = nodes_pb2.Encoded.FromString(node.extension.node)
        return None if encoded.encoder_position else nodes_pb2.Node.FromString(encoded.blob)
    except DecodeError:
        return None
