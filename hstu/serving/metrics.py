"""What a service counts, in the format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from hstu.serving.service import Service

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of a service, in a registry of their own.

    Attributes:
        requests: By route and status.
        seconds: From the first byte to the answer, by route.
        batch_size: Questions that were answered together.
        reloads: Checkpoints taken up ("done") and not ("refused").
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "hstu_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "hstu_request_seconds", "Seconds to the answer.", ["route"], buckets=_SECONDS, registry=self.registry
        )
        self.batch_size = Histogram(
            "hstu_batch_size", "Questions answered together.", buckets=_SIZES, registry=self.registry
        )
        self.reloads = Counter("hstu_reloads", "Checkpoints taken up, and not.", ["outcome"], registry=self.registry)

    def served(self, service: Service) -> None:
        """Also say what ``service`` is doing."""
        self.registry.register(_Present(service))


class _Present(Collector):
    """What is so at the moment of asking."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        model = self.service.model
        yield GaugeMetricFamily("hstu_checkpoint_step", "Step of the checkpoint that is served.", value=model.step)
        yield GaugeMetricFamily("hstu_waiting", "Questions that wait.", value=self.service.batches.waiting)
        ways = CounterMetricFamily(
            "hstu_histories", "Histories by how they were taken in, by this checkpoint.", labels=["way"]
        )
        for way in ("cache", "memory", "whole"):
            ways.add_metric([way], model.ways[way])
        yield ways
        if model.caches is not None:
            yield GaugeMetricFamily("hstu_cached_users", "Users of whom a cache is kept.", value=len(model.caches))
            yield GaugeMetricFamily("hstu_cache_bytes", "Bytes of these caches.", value=model.caches.num_bytes)
            yield CounterMetricFamily(
                "hstu_cache_hits", "Histories that went on from a cache.", value=model.caches.hits
            )
