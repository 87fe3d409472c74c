"""Independent trainings at the same time: on a CPU one network a core beats all cores on one."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


class Cancelled(Exception):
    """Another training failed or the process was asked to stop: this one's result is not wanted."""


def in_parallel(tasks: Sequence[Callable[[Callable[[], None]], T]], device: torch.device) -> Iterator[T]:
    """Results of the tasks in their order, as they come.

    On a CPU as many run at a time as torch has threads, each on one thread; on a GPU one after
    another. A task gets a function to call now and then: it raises `Cancelled` once the result is
    not wanted. Tasks do not depend on global random state (see utils.seed.local_seed).
    """
    threads = torch.get_num_threads()
    workers = min(len(tasks), threads)
    if device.type != "cpu" or workers < 2:
        for task in tasks:
            yield task(lambda: None)
        return
    unwanted = threading.Event()

    def check() -> None:
        if unwanted.is_set():
            raise Cancelled

    def run(task: Callable[[Callable[[], None]], T]) -> T:
        check()
        torch.set_num_threads(1)  # of this thread; the work is spread by networks
        return task(check)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="training")
    try:
        for future in [pool.submit(run, task) for task in tasks]:
            yield future.result()
    finally:
        unwanted.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
