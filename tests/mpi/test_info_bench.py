"""`mpilsgd info` and `mpilsgd bench exchange` under a launcher, small; no speed is asked for."""

from __future__ import annotations

import argparse
import re

import pytest
from mpi4py import MPI

from mpilsgd.comm import inquiry
from mpilsgd.train import bench, info

pytestmark = pytest.mark.mpi
WORLD = MPI.COMM_WORLD


def call(module: object, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)  # type: ignore[attr-defined]
    return module.run(parser.parse_args(arguments))  # type: ignore[attr-defined]


def test_info_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(info) == 0
    out, err = capsys.readouterr()
    if WORLD.rank:
        assert out == ""
    else:
        assert re.search(rf"ranks +{WORLD.size} on \d+ node\(s\)", out)
        assert "WARNING" not in out
    assert err == ""


def test_info_shows_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(info, "--group_size", "1") == 0
    out = capsys.readouterr().out
    if WORLD.rank == 0:
        assert f"in {WORLD.size} group(s)" in out
        assert all(f"group {j}: rank {j}" in out for j in range(WORLD.size))


def test_a_group_size_that_does_not_fit_ends_on_all_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(info, "--group_size", str(WORLD.size + 1)) == 2
    assert ("does not fit" in capsys.readouterr().err) == (WORLD.rank == 0)


def test_facts_are_the_same_on_every_rank() -> None:
    facts = inquiry.info()
    assert len(facts["hosts"]) == facts["size"] == WORLD.size
    assert sorted(rank for ranks in facts["nodes"] for rank in ranks) == list(range(WORLD.size))
    assert WORLD.allgather(facts) == [facts] * WORLD.size


def test_bench_exchange(capsys: pytest.CaptureFixture[str]) -> None:
    status = call(bench, "exchange", "--bytes", "64e3", "--repetitions", "2")
    out = capsys.readouterr().out
    if WORLD.size == 1:
        assert status == 2
        return
    assert status == 0
    if WORLD.rank:
        assert out == ""
        return
    for name in (
        "LSGD round",
        "bare pull",
        "Bcast, lerp_",
        "EASGD exchange",
        "AllreduceSGD exchange",
        ">= 6",
    ):
        assert name in out
    assert "gloo all_reduce" in out or "gloo could not start" in out
    assert re.search(r"LocalSGD average=\"quadratic\" .* [+-]\d", out)
