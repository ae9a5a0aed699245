"""Cases made smaller for as long as they do the same."""

from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import TypeAlias

from google.protobuf.message import DecodeError

from fuzz.cases import Case
from fuzz.mutate import REQUESTS
from worker.plan_proto import Message

# What leads from a request to a message in it: names of fields, and places in those that are repeated.
_Path: TypeAlias = tuple[tuple[str, int | None], ...]

_Step: TypeAlias = Callable[[Message], bool]


async def minimized(case: Case, does_the_same: Callable[[Case], Awaitable[bool]], trials: int) -> Case:
    """The smallest case that is found by leaving out one thing after the other.

    Args:
        case: what is to be made smaller; bytes that are no message stay as they are.
        does_the_same: whether a case still is what it is kept for.
        trials: how often that may be asked.
    """
    try:
        message = REQUESTS[case.kind]()
        message.ParseFromString(case.data)
    except DecodeError:
        return case
    is_smaller = True
    while is_smaller and trials > 0:
        is_smaller = False
        for step in list(_steps(message)):
            if trials <= 0:
                break
            tried = type(message)()
            tried.CopyFrom(message)
            if not step(tried) or tried.ByteSize() >= message.ByteSize():
                continue
            trials -= 1
            if await does_the_same(Case(case.kind, tried.SerializeToString())):
                message, is_smaller = tried, True
    smaller = Case(case.kind, message.SerializeToString())
    return smaller if len(smaller.data) < len(case.data) else case


def _steps(message: Message) -> Iterator[_Step]:
    """What could be left out, the largest parts first. A step says whether what it is about is still there."""
    paths = sorted(_paths(message, ()), key=lambda path: (len(path), str(path)))
    yield from (partial(_hoist, path=path) for path in paths)
    yield from (partial(_drop, path=path) for path in paths if path)
    for path in paths:
        part = _find(message, path)
        for field, value in part.ListFields() if part is not None else ():
            if field.is_repeated and (not field.message_type or len(value) > 4):
                yield partial(_halve, path=path, name=field.name)
            elif not field.message_type:
                yield partial(_clear, path=path, name=field.name)


def _paths(message: Message, path: _Path) -> Iterator[_Path]:
    yield path
    for field, value in message.ListFields():
        if not field.message_type or field.message_type.GetOptions().map_entry:
            continue
        # Of many, those at either end will do: halving leaves out the others.
        places = [None] if not field.is_repeated else sorted({*range(min(len(value), 8)), len(value) - 1})
        for place in places:
            part = value if place is None else value[place]
            yield from _paths(part, (*path, (field.name, place)))


def _find(root: Message, path: _Path) -> Message | None:
    for name, place in path:
        if name not in root.DESCRIPTOR.fields_by_name:
            return None
        value = getattr(root, name)
        if place is None:
            if not root.HasField(name):
                return None
            root = value
        elif place < len(value):
            root = value[place]
        else:
            return None
    return root


def _drop(root: Message, path: _Path) -> bool:
    parent = _find(root, path[:-1])
    name, place = path[-1]
    if parent is None or _find(root, path) is None:
        return False
    if place is None:
        parent.ClearField(name)
    else:
        del getattr(parent, name)[place]
    return True


def _hoist(root: Message, path: _Path) -> bool:
    """Puts the first message of the same type in it into a message's place."""
    part = _find(root, path)
    if part is None:
        return False
    for inner in _paths(part, ()):
        found = _find(part, inner)
        if inner and found is not None and found.DESCRIPTOR is part.DESCRIPTOR:
            kept = type(part)()
            kept.CopyFrom(found)
            part.CopyFrom(kept)
            return True
    return False


def _halve(root: Message, path: _Path, name: str) -> bool:
    part = _find(root, path)
    if part is None:
        return False
    values = getattr(part, name)
    del values[len(values) // 2 :]
    return True


def _clear(root: Message, path: _Path, name: str) -> bool:
    part = _find(root, path)
    if part is None:
        return False
    part.ClearField(name)
    return True
