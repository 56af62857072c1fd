"""How long a call takes and how much memory it needs beyond what was held before, on a CPU or a GPU."""

import ctypes
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

FLUSH_BYTES = 256 << 20  # more than any L2 holds
CYCLES = 2e9  # of a GPU in a second, or fewer

_measured = 0.0
_trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)  # of glibc


def measured() -> float:
    """Seconds that `Clock.seconds` has measured so far: the timer that pytest-benchmark reads, so that its rows hold
    the same times, of CUDA events on a GPU."""
    return _measured


class Clock:
    """On a GPU CUDA events with a cold L2; on a CPU wall time, with caches as the call before left them.

    A GPU can be made to wait, so that the host is ahead of it when a call begins and launches cost nothing.

    On one thread of a CPU it is the processor's time, to which other work on the machine matters little.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.now = time.process_time if not self.cuda and torch.get_num_threads() == 1 else time.perf_counter
        self.flushed = torch.empty(FLUSH_BYTES if self.cuda else 0, dtype=torch.int8, device=device)

    def seconds(self, run: Callable[[], object], lead: float = 0.0) -> float:
        """Time of one call, until the device is done with it; a GPU waits for `lead` seconds before it begins."""
        global _measured
        self.flushed.zero_()
        if self.cuda:
            torch.cuda._sleep(int(lead * CYCLES))
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            took = begin.elapsed_time(end) / 1e3
        else:
            start = self.now()
            run()
            took = self.now() - start
        _measured += took
        return took

    def host(self, run: Callable[[], object]) -> float:
        """Time until a call returns, whether the device is done with it or not."""
        torch.cuda.synchronize()
        start = self.now()
        run()
        took = self.now() - start
        torch.cuda.synchronize()
        return took

    def is_lost(self) -> bool:
        """Whether the GPU gave up on this process, as after a wrong address: nothing more can be measured in it."""
        try:
            if self.cuda:
                torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    def memory(self, run: Callable[[], object]) -> tuple[object, int]:
        """What a call returns, and the most bytes beyond those held before it, its results among them."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out = run()
            torch.cuda.synchronize()
            return out, torch.cuda.max_memory_allocated() - before
        _trim(0)  # what the heap keeps for later would hide what is asked for
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        out = run()
        return out, max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024
