"""Kernels that are called from several threads, that are idle, and in forked children."""

import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from exact import (
    FLOAT,
    MIXED,
    Known,
    Layer,
    Runner,
    each_quantizing,
    make_layer,
    make_matrix,
    make_rows,
    make_tokens,
)
from torch import Tensor

from moqa.format.scheme import Scheme

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Work:
    """A linear layer and experts that are enough for several threads, with what they give."""

    runner: Runner
    known: Known
    layer: Layer
    given: tuple

    def do(self) -> list[Tensor]:
        x, *tokens = self.given
        return [self.runner.linear(self.known.matrix, x), self.runner.experts(self.layer.stack, *tokens)]


@pytest.fixture
def work(runner) -> Work:
    torch.set_num_threads(2)
    known, layer = make_matrix(Scheme(width=2, encoding="trellis"), (300, 400), 0), make_layer(MIXED, 72, 300)
    return Work(runner, known, layer, (make_rows(50, 400, FLOAT, 0), *make_tokens(layer, 40, 2)))


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@each_quantizing
def test_callers_on_several_threads_do_not_disturb_each_other(work):
    wanted = work.do()
    with ThreadPoolExecutor(4) as pool:
        assert all(same(found, wanted) for found in pool.map(lambda _: work.do(), range(40)))


@each_quantizing
def test_idle_threads_use_no_processor(work):
    work.do()
    # a busy machine may take its time to let them find that there is nothing to do
    assert any(_processor_time(0.5) < 0.05 for _ in range(200))


def _processor_time(seconds: float) -> float:
    before = time.process_time()
    time.sleep(seconds)
    return time.process_time() - before


def _in_child(send, work: Work) -> None:
    torch.set_num_threads(2)
    send.send([tensor.tolist() for tensor in work.do()])


@each_quantizing
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_a_forked_child_computes_the_same(work, busy):
    """Threads and what they hold do not survive a fork: a child that waited for its parent's would hang."""
    wanted, context = work.do(), multiprocessing.get_context("fork")
    large = make_matrix(Scheme(width=4), (800, 800), 0).matrix, make_rows(400, 800, FLOAT, 0)
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_in_child, args=(send, work))
    forked, computes = threading.Event(), threading.Event()

    def compute() -> None:
        while not forked.is_set():
            work.runner.linear(*large)
            computes.set()

    with ThreadPoolExecutor(1) as pool:
        if busy:
            pool.submit(compute)
            assert computes.wait(120)
        child.start()
        forked.set()
    try:
        assert receive.poll(120), "the child hangs"
        found = receive.recv()
        child.join(120)
        assert child.exitcode == 0
    finally:
        child.kill()
    assert same([torch.tensor(tensor) for tensor in found], wanted)
    assert same(work.do(), wanted)  # and the parent's threads are as they were
