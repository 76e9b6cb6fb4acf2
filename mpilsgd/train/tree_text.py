"""`mpilsgd info --tree`: the tree that EASGDTree lays over the ranks, and what its edges will carry."""

from __future__ import annotations

import argparse
import collections
import sys
from collections.abc import Sequence

from mpilsgd.comm import Topology, inquiry
from mpilsgd.train.table import columns, in_bytes, ranges
from mpilsgd.tree import INNER, SCHEMES, Periods, Tree, cut, lay_tree, tree_problem


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """The arguments of `mpilsgd info --tree`."""

    def whole(name: str, default: int | None, help: str) -> None:
        spelled = [f"--{name}"] + ([f"--{name.replace('_', '-')}"] if "_" in name else [])
        group.add_argument(*spelled, type=whole_number, default=default, metavar="N", help=help)

    whole("ranks", None, "lay it over so many ranks, which need not be started (default: those that are)")
    whole("nodes", None, "... in blocks on so many nodes (default 1)")
    whole("degree", 16, "children of a tree node, at most (%(default)s)")
    group.add_argument(
        "--inner",
        choices=INNER,
        default=INNER[0],
        help="inner nodes take ranks of their own (ranks, the default) or live on leaves (hosted)",
    )
    group.add_argument("--scheme", choices=SCHEMES, default=SCHEMES[0], help="of communication (%(default)s)")
    whole("period", None, "multi-scale: steps between messages of leaves and parents (10)")
    whole("upper_period", None, "... and above (100)")
    whole("up_period", None, "up-down: steps between messages to the parent (8)")
    whole("down_period", None, "... and to the children (80)")
    whole("parameters", 1_000_000, "of the model, float32 (%(default)s)")
    group.add_argument(
        "--step_time",
        "--step-time",
        type=float,
        default=0.1,
        metavar="S",
        help="seconds of a leaf's step (%(default)s)",
    )


def whole_number(text: str) -> int:
    """A whole number; 1e6 is one."""
    if not float(text).is_integer():
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text}")
    return int(float(text))


def given(args: argparse.Namespace) -> list[str]:
    """The options that were given and have no default."""
    names = ("ranks", "nodes", "period", "upper_period", "up_period", "down_period")
    return [f"--{name}" for name in names if getattr(args, name) is not None]


def run(args: argparse.Namespace, topology: Topology) -> int:
    """Rank 0 prints the tree. Exit status 2: there is none."""
    if args.ranks is None:
        nodes, names = topology.nodes, inquiry.hosts(topology.world)
    else:
        count = args.nodes or 1
        nodes = cut(list(range(max(0, args.ranks))), min(count, max(1, args.ranks)))
        names = [f"node {k}" for k, ranks in enumerate(nodes) for _ in ranks]
    p = sum(map(len, nodes))
    periods = Periods(args.scheme, args.period, args.upper_period, args.up_period, args.down_period)
    problems = [tree_problem(p, args.degree), periods.problem()]
    problems += [
        f"{name} must be above 0" for name in ("parameters", "step_time") if getattr(args, name) <= 0
    ]
    if args.ranks is not None and args.ranks < 2:
        problems = [f"ranks must be at least 2, not {args.ranks}: a tree has two levels, parents and leaves"]
    elif args.nodes is not None and args.ranks is None:
        problems = ["--nodes goes with --ranks: those that are started lie where they are"]
    elif args.nodes is not None and not 1 <= args.nodes <= args.ranks:
        problems = [f"--nodes must be from 1 to the number of ranks, {args.ranks}, not {args.nodes}"]
    if topology.world.rank:
        return 2 if any(problems) else 0
    if any(problems):
        print("mpilsgd info: " + "; ".join(problem for problem in problems if problem), file=sys.stderr)
        return 2
    tree = lay_tree(nodes, args.degree, args.inner)
    print(text(tree, nodes, names, periods, 4 * args.parameters, args.step_time))
    return 0


def summary_line(tree: Tree) -> str:
    """How large it is."""
    leaves = sum(map(tree.is_leaf, range(len(tree.parent))))
    hosted = " that they host" if max(tree.host) + 1 < len(tree.parent) else ""
    most = max(map(len, tree.children))
    return (
        f"{_count(leaves, 'leaf', 'leaves')}, {_count(len(tree.parent) - leaves, 'inner node')}{hosted}, "
        f"{tree.levels} levels, at most {_count(most, 'child', 'children')}"
    )


def _count(n: int, one: str, several: str = "") -> str:
    return f"{n} {one if n == 1 else several or one + 's'}"


def text(
    tree: Tree,
    nodes: Sequence[Sequence[int]],
    names: Sequence[str],
    periods: Periods,
    nbytes: int,
    seconds: float,
) -> str:
    """The tree node by node, then its edges by kind, then what each node sends and gets."""
    p = sum(map(len, nodes))
    node_of = {rank: k for k, ranks in enumerate(nodes) for rank in ranks}
    lines = [f"{p} ranks on {_count(len(nodes), 'node')}: {summary_line(tree)}", ""]
    for ranks in nodes:
        lines.append(f"{names[ranks[0]]}: ranks {ranges(ranks)}")
        own = [i for i, children in enumerate(tree.children) if children and tree.host[i] in ranks]
        for i in sorted(own, key=lambda i: (tree.depth(i), i)):
            what = "root" if i == tree.root else f"inner node of level {tree.depth(i)}"
            lines.append(f"  rank {tree.host[i]:<5} {what}, over {_children(tree, i)}")
        above = collections.Counter(
            tree.host[tree.parent[r]]
            for r in ranks
            if tree.is_leaf(r) and tree.host[tree.parent[r]] not in ranks
        )
        for host, count in above.items():
            lines.append(f"  {_count(count, 'leaf', 'leaves')} of rank {host}, on another node")
    edges: collections.Counter[tuple[int, bool, bool]] = collections.Counter()
    across = {k: [0.0, 0.0] for k in range(len(nodes))}
    for child, parent in enumerate(tree.parent):
        if parent < 0:
            continue
        here, there = tree.host[child], tree.host[parent]
        up, down = (nbytes / (every * seconds) for every in periods.of(tree.is_leaf(child)))
        edges[tree.depth(child), tree.is_leaf(child), node_of[here] != node_of[there]] += 1
        if node_of[here] != node_of[there]:
            for k, out, into in ((node_of[here], up, down), (node_of[there], down, up)):
                across[k][0] += out
                across[k][1] += into
    rows = [["edges", "number", "between nodes", "up every", "bytes/s", "down every", "bytes/s"]]
    for (depth, leaf, between), count in sorted(edges.items()):
        up, down = periods.of(leaf)
        kind = f"level {depth} to {depth - 1}" + (", leaves" if leaf else "")
        rows.append([kind, str(count), "yes" if between else "no"])
        rows[-1] += [
            f"{up} steps",
            in_bytes(nbytes / (up * seconds)),
            f"{down} steps",
            in_bytes(nbytes / (down * seconds)),
        ]
    lines += ["", f"each edge, with a model of {in_bytes(nbytes)} and steps of {seconds:g} s:", columns(rows)]
    if len(nodes) > 1:
        rows = [["node", "sends, bytes/s", "gets, bytes/s"]]
        rows += [[names[nodes[k][0]], in_bytes(out), in_bytes(into)] for k, (out, into) in across.items()]
        lines += ["", "over the network, all edges of a node together:", columns(rows)]
    return "\n".join(lines)


def _children(tree: Tree, i: int) -> str:
    leaves = [c for c in tree.children[i] if tree.is_leaf(c)]
    inner = [tree.host[c] for c in tree.children[i] if not tree.is_leaf(c)]
    parts = [f"{len(inner)} inner nodes (rank {ranges(inner)})"] if inner else []
    return " and ".join(parts + ([f"{len(leaves)} leaves (rank {ranges(leaves)})"] if leaves else []))
