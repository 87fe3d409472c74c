"""Trainings at the same time give what they give one after another."""

import threading
import time

import pytest
import torch

from clom.source import network_factory
from data.load import ImageSet, ImageSplit
from data.specs import Stats
from data.synthetic import SyntheticSet
from evaluation.parallel import Cancelled, in_parallel
from evaluation.recipes import dc_evaluation
from evaluation.score import score_network

CPU = torch.device("cpu")


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_results_in_order_and_threads_put_back(two_threads):
    running, most, lock = [0], [0], threading.Lock()

    def task(number):
        def run(check):
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
            time.sleep(0.02 * (3 - number % 3))
            check()
            with lock:
                running[0] -= 1
            return number, torch.get_num_threads()

        return run

    assert list(in_parallel([task(n) for n in range(6)], CPU)) == [(n, 1) for n in range(6)]
    assert most[0] == 2 and torch.get_num_threads() == 2


def test_one_thread_means_one_after_another():
    main = threading.current_thread()
    tasks = [lambda check: threading.current_thread() is main] * 3
    assert list(in_parallel(tasks, CPU)) == [True] * 3


def test_a_failure_ends_the_others(two_threads):
    seen = []

    def endless(check):
        try:
            while True:
                check()
                time.sleep(0.001)
        except Cancelled:
            seen.append("ended")
            raise

    def failing(check):
        time.sleep(0.02)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(in_parallel([failing, endless, endless], CPU))
    assert seen in (["ended"], ["ended", "ended"]) and torch.get_num_threads() == 2


def test_networks_score_the_same(two_threads):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, 3, 8, 8), generator=generator).to(torch.uint8)
    split = ImageSplit(images, torch.arange(40) % 4, None)
    image_set = ImageSet("x", 8, split, split, 4, Stats((0.5,) * 3, (0.3,) * 3), True)
    x = torch.randn(8, 3, 8, 8, generator=generator)

    def score(seed, check=lambda: None):
        return score_network(
            network_factory("ConvNetD1", image_set, CPU),
            SyntheticSet(x, torch.arange(8) % 4),
            image_set,
            dc_evaluation(4, 0.01, 8, dsa="color_crop_flip"),
            seed=seed,
            device=CPU,
            check=check,
        )

    torch.manual_seed(5)
    together = list(in_parallel([lambda c, s=s: score(s, c) for s in range(4)], CPU))
    after = torch.random.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(after, torch.random.get_rng_state())  # the global state is left alone
    torch.set_num_threads(1)
    assert together == [score(s) for s in range(4)]
