"""The benchmarks run, and print the ratios that they are for."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def printed(benchmark: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--quick", "--rounds", "1", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_the_throughput_of_both_servers_and_its_ratio_are_printed_for_every_case() -> None:
    output = printed("throughput", "--scale", "0.1")
    for case in ("8 x float64, 1 k", "8 x float64, 8 k", "8 x float64, 64 k", "lineitem, 4 part", "lineitem, 1 part"):
        assert re.search(rf"^{case}.*(\s+\d+){{4}}\s+\d+\.\d\d$", output, re.MULTILINE), output


@pytest.mark.slow
def test_the_latency_in_process_and_of_both_servers_and_their_ratios_are_printed() -> None:
    output = printed("latency")
    for row in ("in-process", "worker", "pyarrow.flight", "worker / in-process", "worker / pyarrow.flight"):
        assert re.search(rf"^{row}\s+\d+\.\d\d\s+\d+\.\d\d\s+[\d.]+$", output, re.MULTILINE), output
