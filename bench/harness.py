"""What the benchmarks share: contenders checked against each other, interleaved rounds, medians, peak memory."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import gapo_kernels
from gapo_kernels import host_memory

RESULTS = Path(__file__).parent / "results"


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line for line in lines if line.startswith("flags")), "")
    return f"{model}, {torch.get_num_threads()} threads{', AVX-512' if 'avx512f' in flags else ''}"


def allocator_settings() -> dict[str, str]:
    """glibc's knobs, as the environment sets them: they decide what a fresh tensor the size of the logits costs."""
    return {name: value for name, value in os.environ.items() if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"}


def environment() -> dict[str, str | int | dict[str, str]]:
    """What a result must say of where it came from."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=RESULTS.parent, capture_output=True, text=True
    ).stdout.strip()
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "gapo_kernels": gapo_kernels.__version__,
        "commit": commit or "unknown",
        "allocator": allocator_settings(),
    }


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call, the device's work included."""
    if torch.cuda.is_available():
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def interleaved(
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    reset: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of every contender in every round, the contenders taking turns so that drift meets all of them.

    In each turn a contender runs once untimed and then timed, as it does in a loop of its own: nobody pays for what
    another left in the caches and page tables. `reset` runs before each call, untimed.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    gc.disable()
    try:
        for number in range(warmup + rounds):
            for name, function in contenders.items():
                reset()
                function()
                reset()
                seconds = timed(function)
                if number >= warmup:
                    times[name].append(seconds)
    finally:
        gc.enable()
    return times


def summary(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "median_ms": statistics.median(ordered) * 1e3,
        "min_ms": ordered[0] * 1e3,
        "max_ms": ordered[-1] * 1e3,
    }


def ratio(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """Median of the rounds' own ratios, with the quartiles as spread."""
    quotients = sorted(a / b for a, b in zip(numerator, denominator))
    low, middle, high = statistics.quantiles(quotients, n=4)
    return {"median": middle, "quartile_1": low, "quartile_3": high}


def peak_bytes(function: Callable[[], object]) -> int | None:
    """Bytes held at the worst moment of a call beyond what was held before it; None where that cannot be known."""
    gc.collect()
    host_memory.release()  # a kept gradient would hide its successor
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts over from what is resident now
        before = _status("VmRSS")
        function()
        return _status("VmHWM") - before
    except OSError:
        return None


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def write_results(name: str, cases: list[dict]) -> Path:
    """bench/results/NAME-DEVICE.json, replaced as a whole; with an allocator set by hand, under a name of its own."""
    RESULTS.mkdir(exist_ok=True)
    slug = "".join(c if c.isalnum() else "-" for c in device_name()).strip("-").lower()
    while "--" in slug:
        slug = slug.replace("--", "-")
    path = RESULTS / f"{name}-{slug}{'-tuned-allocator' if allocator_settings() else ''}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(
        json.dumps(
            {"environment": environment(), "command": " ".join(["pytest", *sys.argv[1:]]), "cases": cases}, indent=1
        )
        + "\n"
    )
    os.replace(temporary, path)
    return path
