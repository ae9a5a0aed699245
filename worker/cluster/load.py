"""What coordinators that plan as they go want to know of a partition: how much there is, and of how many values."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from worker.proto import worker_pb2

# Upstream's workers look at as many rows, of what they have by then (src/execution_plans/sampler.rs).
SAMPLED_ROWS = 1000


class Load:
    """Adds up what a partition has."""

    def __init__(self, schema: pa.Schema) -> None:
        self._rows = 0
        self._bytes = [0] * len(schema)
        self._nulls = [0] * len(schema)
        self._sample: list[pa.RecordBatch] = []
        self._sampled = 0

    def add(self, batches: Sequence[pa.RecordBatch]) -> None:
        """Adds batches. Blocks for as long as it takes to count nulls."""
        for batch in batches:
            self._rows += batch.num_rows
            for index, column in enumerate(batch.columns):
                self._bytes[index] += column.nbytes
                self._nulls[index] += column.null_count
            if self._sampled < SAMPLED_ROWS:
                self._sample.append(batch.slice(0, SAMPLED_ROWS - self._sampled))
                self._sampled += self._sample[-1].num_rows

    def to_proto(self, partition: int) -> worker_pb2.LoadInfo:
        """What there is of a partition that has ended."""
        return worker_pb2.LoadInfo(
            partition=partition,
            rows_ready=self._rows,
            per_column_bytes_ready=self._bytes,
            per_column_ndv_percentage=[self._distinct(index) for index in range(len(self._bytes))],
            per_column_null_percentage=[nulls / max(1, self._rows) for nulls in self._nulls],
            rows_pulled_from_leaf=self._rows,
            reached_eos=True,
        )

    def _distinct(self, index: int) -> float:
        """Distinct values of a column, as a share of the rows that were looked at."""
        columns = [batch.column(index) for batch in self._sample]
        if not self._sampled:
            return 0.0
        try:
            values: int = pc.count_distinct(pa.chunked_array(columns), mode="only_valid").as_py()
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
            values = len({str(value) for column in columns for value in column.to_pylist() if value is not None})
        return values / self._sampled
