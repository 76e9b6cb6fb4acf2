"""Waiting beside the computing: what the thread keeps, and what an interrupt leaves."""

from __future__ import annotations

import weakref

import pytest
import torch

from mpilsgd.comm.waiting import Background, complete


class Given:
    pass


def test_the_thread_keeps_nothing_of_what_is_done() -> None:
    thread = Background("test", torch.device("cpu"))
    seen: list[int] = []
    given = Given()
    gone = weakref.ref(given)
    done = thread.submit(lambda it: seen.append(id(it)), given)
    expected = id(given)
    del given
    assert done.result(60) is None
    assert seen == [expected]
    assert gone() is None
    thread.end()


def test_what_the_thread_meets_with_is_told() -> None:
    thread = Background("test", torch.device("cpu"))

    def fail(_: int) -> None:
        raise ValueError("no")

    failed, after = thread.submit(fail, 1), thread.submit(lambda _: None, 2)
    with pytest.raises(ValueError, match="no"):
        failed.result(60)
    assert after.result(60) is None
    thread.end()


def test_an_interrupted_wait_ends_with_the_request() -> None:
    class Request:
        completed = False

        def Test(self) -> bool:
            raise KeyboardInterrupt

        def Wait(self) -> None:
            self.completed = True

    request = Request()
    with pytest.raises(KeyboardInterrupt):
        complete(request)  # type: ignore[arg-type]
    assert request.completed
