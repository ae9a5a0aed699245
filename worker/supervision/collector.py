"""What a supervisor tells Prometheus: the metrics of all its workers, and its own."""

import contextlib
import urllib.request
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from worker.metrics_server import MetricsServer
from worker.supervision.supervisor import Place, Supervisor

# Of several workers, which one it is: the number of its port.
LABEL = "worker"

# A worker that does not answer must not keep the others from being seen.
SECONDS = 1.0


def serve(supervisor: Supervisor, host: str, port: int) -> int:
    """Serves the metrics of a supervisor over HTTP, in threads; returns the port.

    Args:
        supervisor: whose.
        host: the address to listen on.
        port: 0 picks a free one.

    Raises:
        OSError: the address cannot be listened on.
    """
    registry = CollectorRegistry()
    registry.register(SupervisorCollector(supervisor))
    return MetricsServer(registry, host, port).port


class SupervisorCollector(Collector):
    """Asks the workers that are up, each time anew."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def collect(self) -> Iterator[Metric]:
        """The workers' metrics, and the supervisor's; called in threads."""
        places = list(self._supervisor.places)
        labels = {place.port: {LABEL: str(place.port)} if len(places) > 1 else {} for place in places}
        yield from combined((labels[place.port], text) for place in places if (text := _scraped(place)))
        names = (LABEL,) if len(places) > 1 else ()
        up = GaugeMetricFamily("worker_up", "Whether there is a worker that listens", labels=names)
        restarts = CounterMetricFamily("worker_restarts", "How often the worker was replaced", labels=names)
        for place in places:
            up.add_metric(tuple(labels[place.port].values()), place.is_up)
            restarts.add_metric(tuple(labels[place.port].values()), place.restarts)
        yield up
        yield restarts
        yield GaugeMetricFamily(
            "worker_quarantined_plans",
            "Plans that are refused, since they ended workers",
            self._supervisor.quarantined(),
        )

    def describe(self) -> Iterable[Metric]:
        """Nothing: what there is depends on the workers."""
        return ()


def combined(scraped: Iterable[tuple[Mapping[str, str], str]]) -> Iterator[Metric]:
    """The metrics of several texts that Prometheus could read, those of one name together.

    Args:
        scraped: the texts, and the labels that set their samples apart from those of others.
    """
    families: dict[str, Metric] = {}
    for labels, text in scraped:
        for family in text_string_to_metric_families(text):
            together = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            together.samples += [sample._replace(labels={**sample.labels, **labels}) for sample in family.samples]
    yield from families.values()


def _scraped(place: Place) -> str:
    """What the worker of a place says, if there is one that answers."""
    child = place.child
    if child is None or child.metrics_port is None or not place.is_up:
        return ""
    with (
        contextlib.suppress(OSError),
        urllib.request.urlopen(f"http://127.0.0.1:{child.metrics_port}/metrics", timeout=SECONDS) as answer,
    ):
        text: str = answer.read().decode()
        return text
    return ""
