"""Compiles what the selected tests ask for, on every core from the start: tests wait for what they need of it."""

from __future__ import annotations

import os
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context

import pytest

_futures: dict[object, Future] = {}
_pools: list[ProcessPoolExecutor] = []


def pytest_collection_finish(session):
    jobs = dict.fromkeys(i.callspec.params["job"] for i in session.items if "job" in getattr(i, "fixturenames", ()))
    if not jobs or session.config.option.collectonly:
        return
    import launches  # imports Triton, which a machine may lack: there are no jobs then

    # Not forked: torch's threads may hold locks.
    workers = min(8, len(os.sched_getaffinity(0)))
    _pools.append(ProcessPoolExecutor(workers, mp_context=get_context("spawn")))
    _futures.update((job, _pools[0].submit(launches.compile_job, job)) for job in jobs)


def pytest_unconfigure():
    for pool in _pools:
        pool.shutdown(wait=False, cancel_futures=True)


@pytest.fixture
def compiled(job):
    """Case -> kernel's name -> artefacts.Artefact."""
    return _futures[job].result()
