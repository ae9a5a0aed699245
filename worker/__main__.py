"""``python -m worker``."""

from worker.allocator import restart_keeping_engine_memory
from worker.cli import main
from worker.config import usable_memory

# Where there is less, what is kept would be missed.
PLENTY = 4 << 30

if usable_memory() >= PLENTY:
    restart_keeping_engine_memory()
main()
