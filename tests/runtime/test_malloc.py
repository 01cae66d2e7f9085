"""Freed memory stays with the process."""

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys
from ostro.runtime.malloc import keep_freed_memory
import torch
if sys.argv[1] == "keep":
    assert keep_freed_memory()
x = torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    y = x + 1
    z = y * 2
    del y
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc only")
def test_large_tensors_are_not_paged_in_again_and_again():
    def faults(how: str) -> int:
        command = [sys.executable, "-c", CODE, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < faults("default") / 2
