"""The layout of EASGD trees, and what `mpilsgd info --tree` says of it."""

from __future__ import annotations

import contextlib
import io
import random
import subprocess
from collections.abc import Iterator

import pytest

from mpilsgd.cli import main
from mpilsgd.tree import Periods, cut, lay_tree, tree_problem


def layouts() -> Iterator[tuple[list[list[int]], int]]:
    """Nodes of equal and of quite different sizes, and degrees."""
    for ranks in range(2, 80):
        for nodes in {1, 2, 3, ranks // 2, ranks}:
            if 1 <= nodes <= ranks:
                yield cut(list(range(ranks)), nodes), 2 + ranks % 7
    choose = random.Random(5)
    for _ in range(300):
        sizes = [choose.randint(1, 12) for _ in range(choose.randint(2, 9))]
        starts = [sum(sizes[:k]) for k in range(len(sizes))]
        yield [list(range(a, a + n)) for a, n in zip(starts, sizes, strict=True)], choose.randint(2, 8)


@pytest.mark.parametrize("inner", ["ranks", "hosted"])
def test_every_layout_is_a_tree_of_that_degree(inner: str) -> None:
    for nodes, degree in layouts():
        tree = lay_tree(nodes, degree, inner)
        p, n = sum(map(len, nodes)), len(tree.parent)
        assert tree.parent.count(-1) == 1
        assert all(tree.parent[c] == i for i, children in enumerate(tree.children) for c in children)
        assert sorted(c for children in tree.children for c in children) == [
            i for i in range(n) if i != tree.root
        ]
        assert all(tree.depth(i) < n for i in range(n))  # no circles
        assert max(map(len, tree.children)) <= degree
        assert all(children == sorted(children) for children in tree.children)
        assert tree.host[:p] == list(range(p))
        if inner == "ranks":
            assert n == p
        else:
            assert [i for i in range(n) if tree.is_leaf(i)] == list(range(p))
            assert all(0 <= host < p for host in tree.host)


@pytest.mark.parametrize("inner", ["ranks", "hosted"])
def test_leaves_and_parents_share_a_node(inner: str) -> None:
    """But for ranks that are alone on theirs, or left alone by an inner node."""
    for nodes, degree in layouts():
        tree = lay_tree(nodes, degree, inner)
        node_of = {rank: k for k, ranks in enumerate(nodes) for rank in ranks}
        for k, ranks in enumerate(nodes):
            leaves = [r for r in ranks if tree.is_leaf(r)]
            away = [r for r in leaves if node_of[tree.host[tree.parent[r]]] != k]
            assert len(away) <= 1 or inner == "hosted", (nodes, degree)
            if inner == "hosted" and len(ranks) > 1:
                assert len(away) <= 1, (nodes, degree)


def test_perfect_trees_are_found() -> None:
    for levels, degree in ((2, 4), (3, 2), (3, 3), (3, 4), (4, 2), (3, 8)):
        ranks = sum(degree**k for k in range(levels))
        tree = lay_tree([list(range(ranks))], degree)
        assert tree.levels == levels
        assert {len(children) for children in tree.children} == {0, degree}
        assert tree.root == 0


def test_the_tree_of_the_thesis() -> None:
    """273 ranks on 16 machines: 256 leaves, each 16 with their parent on one machine, and a root."""
    nodes = cut(list(range(273)), 16)
    tree = lay_tree(nodes, 16)
    assert tree.levels == 3
    assert sum(map(tree.is_leaf, range(273))) == 256
    assert len(tree.children[tree.root]) == 16
    node_of = {rank: k for k, ranks in enumerate(nodes) for rank in ranks}
    assert all(node_of[r] == node_of[tree.parent[r]] for r in range(273) if tree.is_leaf(r))


def test_few_ranks_are_lost_to_averaging() -> None:
    for nodes, degree in layouts():
        tree = lay_tree(nodes, degree)
        p = sum(map(len, nodes))
        least = -(-(p - 1) // degree)  # of any tree
        inner = sum(map(bool, tree.children))
        assert inner <= least + len(nodes) + 2, (nodes, degree)


def test_nobody_averages_for_a_single_leaf_beside_a_parent_with_room() -> None:
    assert lay_tree([[0, 1, 2], [3, 4]], 3).parent == [-1, 0, 0, 0, 3]
    for nodes, degree in layouts():
        tree = lay_tree(nodes, degree)
        node_of = {rank: k for k, ranks in enumerate(nodes) for rank in ranks}
        for i, below in enumerate(tree.children):
            above = tree.parent[i]
            if above >= 0 and len(below) == 1 and tree.is_leaf(below[0]) and node_of[above] == node_of[i]:
                assert len(tree.children[above]) == degree, (nodes, degree)


def test_hosted_inner_nodes_are_spread() -> None:
    tree = lay_tree([list(range(k, k + 4)) for k in (0, 4, 8, 12)], 4, "hosted")
    hosts = tree.host[16:]
    assert len(hosts) == len(set(hosts)) == 5


def test_what_is_no_tree() -> None:
    assert "at least 2" in str(tree_problem(8, 1))
    assert "two levels" in str(tree_problem(1, 2))
    assert tree_problem(2, 2) is None


def test_periods() -> None:
    assert Periods(period=3, upper_period=7).of(True) == (3, 3)
    assert Periods(period=3, upper_period=7).of(False) == (7, 7)
    assert Periods("up-down", up_period=2, down_period=9).of(True) == (2, 9)
    assert Periods().problem() is None
    assert (
        Periods("up-down").of(False) == (8, 80)
        and Periods().of(True) == (10, 10)
        and Periods().of(False)[0] == 100
    )
    assert "larger" in str(Periods("up-down", up_period=9, down_period=2).problem())
    assert 'is of scheme="up-down"' in str(Periods(up_period=2, down_period=9).problem())


def info(*options: str, tree: bool = True) -> subprocess.CompletedProcess[str]:
    """As a command, but without the seconds that starting one takes."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(["info", *(["--tree"] if tree else []), *options])
        except SystemExit as end:
            status = int(end.code or 0)
    return subprocess.CompletedProcess(options, status, out.getvalue(), err.getvalue())


def test_info_prints_a_tree_that_is_not_started() -> None:
    told = info("--ranks", "273", "--nodes", "16", "--parameters", "10000000", "--step_time", "0.1")
    assert told.returncode == 0, told.stderr
    assert "273 ranks on 16 nodes: 256 leaves, 17 inner nodes, 3 levels" in told.stdout
    assert "40 MB" in told.stdout  # a second on an edge: 40 MB every 10 steps of 0.1 s
    assert "4 MB" in told.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "1"], "two levels"),
        (["--ranks", "9", "--degree", "1"], "degree must be at least 2"),
        (["--ranks", "9", "--nodes", "10"], "--nodes"),
        (["--nodes", "2"], "--nodes goes with --ranks"),
        (["--ranks", "9", "--up_period", "9", "--down_period", "3"], "up_period=9 is larger"),
        (["--ranks", "9", "--step_time", "0"], "step_time must be above 0"),
    ],
)
def test_info_refuses(options: list[str], message: str) -> None:
    told = info(*options)
    assert told.returncode == 2
    assert message in told.stderr


def test_what_is_of_a_tree_goes_with_it() -> None:
    told = info("--ranks", "5", "--period", "2", tree=False)
    assert told.returncode == 2
    assert "--ranks, --period only with --tree" in told.stderr
