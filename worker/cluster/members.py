"""Which workers there are, as far as coordinators have told."""

import time
from collections.abc import Iterable

# Workers come and go. Who is not named for so long has gone.
KEPT_SECONDS = 3600.0

# The most that is kept, whatever plans name.
MAX_MEMBERS = 1000


class Members:
    """URLs that plans named, told to the principal again whose plans those were: nobody else's word counts for it."""

    def __init__(self) -> None:
        self._named: dict[tuple[str, str], float] = {}

    def named(self, principal: str, urls: Iterable[str]) -> None:
        """Keeps URLs that a plan of a principal's names."""
        for url in filter(None, urls):
            # The one that was named last is the last.
            self._named.pop((principal, url), None)
            self._named[principal, url] = time.monotonic()
        while len(self._named) > MAX_MEMBERS:
            del self._named[next(iter(self._named))]

    def of(self, principal: str) -> list[str]:
        """What a principal's plans named of late, in order."""
        oldest = time.monotonic() - KEPT_SECONDS
        return sorted(url for (whose, url), at in self._named.items() if whose == principal and at > oldest)
