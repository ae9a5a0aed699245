"""What recipes have in common: how one looks, and the numbers that hurt."""

from typing import TypeAlias

from fuzz.cases import Case, Kind
from worker.plan_proto import Message

# The name of a case, what it is about, and what is sent.
Recipe: TypeAlias = tuple[str, str, Case]

U32 = (1 << 32) - 1
U64 = (1 << 64) - 1
I32 = (1 << 31) - 1
I64 = (1 << 63) - 1

# Nobody listens there.
NOBODY = "http://127.0.0.1:1"
QUERY = bytes(range(16))


def recipe(name: str, about: str, message: Message | bytes, kind: Kind = Kind.PLAN) -> Recipe:
    """A recipe for a plan."""
    return name, about, Case(kind, message if isinstance(message, bytes) else message.SerializeToString())
