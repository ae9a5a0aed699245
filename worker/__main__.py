"""``python -m worker``."""

from worker.allocator import restart_keeping_engine_memory
from worker.cli import main

restart_keeping_engine_memory()
main()
