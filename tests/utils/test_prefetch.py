import threading
from concurrent.futures import ProcessPoolExecutor

import pytest

from mlpmatch_pl.utils.prefetch import ordered_map


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order(workers):
    assert list(ordered_map(lambda item: 2 * item, range(50), workers)) == list(range(0, 100, 2))


@pytest.mark.parametrize(("workers", "in_flight", "ahead"), [(0, None, 0), (1, None, 4), (2, 5, 5)])
def test_items_are_consumed_a_bounded_number_ahead(workers, in_flight, ahead):
    consumed = []
    results = ordered_map(lambda item: item, (consumed.append(item) or item for item in range(100)), workers, in_flight)
    for count in range(1, 4):
        next(results)
        assert len(consumed) == count + ahead
    results.close()


def test_calls_run_in_parallel():
    barrier = threading.Barrier(2, timeout=30)
    assert list(ordered_map(lambda item: barrier.wait() in (0, 1), range(4), workers=2)) == [True] * 4


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_cancels_the_calls_that_have_not_started(workers):
    started = []

    def divide(item):
        started.append(item)
        return 1 / item

    with pytest.raises(ZeroDivisionError):
        list(ordered_map(divide, [1, 0, *range(1, 1000)], workers))
    assert len(started) < 20


def test_a_process_pool_can_do_the_work():
    assert list(ordered_map(abs, [-1, 2, -3], 1, pool=ProcessPoolExecutor)) == [1, 2, 3]
