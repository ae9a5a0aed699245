"""STUB"""

from pathlib import Path
from worker import plan_proto
from worker.message import *


class Received:
    def __init__(self, schema, partitions, folder, name):
        self.schema = schema
        self.parts = [[] for _ in range(partitions)]
        self.held = 0
        self.heads = {}

    def add(self, partition, source, header, body):
        if header_type(bytes(header)) == 1:
            if self.parts[partition]:
                return
        h = bytes(header)
        pad = -len(h) % 8
        b = b"".join(body)
        self.parts[partition].append(CONTINUATION + LENGTH.pack(len(h) + pad) + h + b"\0" * pad + b)

    def flush(self):
        pass

    def finish(self):
        pass

    def scan(self, url, partitioning):
        n = plan_proto.PhysicalPlanNode()
        n.memory_scan.schema.CopyFrom(self.schema)
        for p in self.parts:
            n.memory_scan.partitions.append(b"".join(p) + (CONTINUATION + b"\0" * 4 if p else b""))
        return n
