"""Readers given what was damaged or made up: what was saved, or one line that names the file; never more."""

from __future__ import annotations

import gzip
import json
import math
import pickle
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpilsgd import Topology, sealed
from mpilsgd.comm import MPI
from mpilsgd.exchange.course import Course
from mpilsgd.train import formats, manifest
from mpilsgd.train.callables import InputError
from mpilsgd.train.command_line import ConfigError, parse
from mpilsgd.train.formats import DataError, read_cifar_binary, read_cifar_python, read_idx
from mpilsgd.train.report import table
from mpilsgd.train.run_directory import RunDirectory
from mpilsgd.train.run_reader import RunError, read_runs

SECONDS, BYTES = 5, 500_000_000  # that reading one file may take
RECORDS = 20  # of CIFAR-10's 10,000 in a file


def by_examples(few: int) -> Any:
    """So many in every run, 3,000 among those marked slow."""
    return pytest.mark.parametrize("examples", [few, pytest.param(3000, marks=pytest.mark.slow)])


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """What a reader asks for beyond BYTES it does not get."""
    if not sys.platform.startswith("linux"):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def search(cases: st.SearchStrategy[Any], examine: Callable[[Any], None], examples: int) -> None:
    """Examines so many cases, the same ones in every run."""
    each = settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )

    def timed(case: Any) -> None:
        start = time.process_time()
        examine(case)
        assert time.process_time() - start < SECONDS

    each(given(cases)(timed))()


def search_damage(content: bytes, examine: Callable[[bytes], None], examples: int) -> None:
    """The file as it is, and damaged."""
    examine(content)
    search(DAMAGE, lambda damage: examine(damaged(content, damage)), examples)


def refusal(read: Callable[[], Any], kind: type[Exception], path: Path) -> tuple[Any, str]:
    """What was read, or one line that names the file."""
    try:
        return read(), ""
    except kind as error:
        told = str(error)
        assert told.isprintable() and str(path) in told and len(told) < 1000, told
        assert not isinstance(error.__cause__, MemoryError)
        return None, told


# Cases

NOISE = [
    b"\0",
    b"\xff" * 8,
    b"\xef\xbb\xbf",
    b"1e400",
    b"9" * 30,
    b"-",
    b"\n",
    b"\t",
    b"{",
    b"[[[[",
    b'"',
    b": ",
]
WAYS: dict[str, Callable[[bytes, int, int, bytes], bytes]] = {
    "one byte": lambda c, a, b, more: c[:a] + bytes([c[a] ^ (1 << b % 8)]) + c[a + 1 :] if a < len(c) else c,
    "cut": lambda c, a, b, more: c[:a],
    "gap": lambda c, a, b, more: c[:a] + c[b:],
    "insertion": lambda c, a, b, more: c[:a] + more + c[a:],
    "repetition": lambda c, a, b, more: c[:b] + c[a : min(b, a + 500)] * 5 + c[b:],
    "overwritten": lambda c, a, b, more: c[:a] + more + c[a + len(more) :],
    "another encoding": lambda c, a, b, more: c.decode("latin1").encode(
        ("utf-16", "utf-8-sig", "cp500")[a % 3]
    ),
    "packed": lambda c, a, b, more: gzip.compress(c, 1),
    "empty": lambda c, a, b, more: b"",
    "nested": lambda c, a, b, more: c[:a] + b"[" * 5000 + c[a:],
}


# One to three things done to a file, where, and with what; most often such that leave it nearly as it was.
DAMAGE = st.lists(
    st.tuples(
        st.sampled_from([*WAYS, *["one byte", "overwritten"] * 3]),
        st.floats(0, 1) | st.floats(0, 0.05),
        st.floats(0, 1),
        st.sampled_from(NOISE) | st.binary(max_size=8),
    ),
    min_size=1,
    max_size=3,
)


def damaged(content: bytes, damage: list[tuple[str, float, float, bytes]]) -> bytes:
    for way, first, second, more in damage:
        a, b = sorted(int(place * len(content)) for place in (first, second))
        content = WAYS[way](content, a, b, more)
    return content


deep: list[Any] = []
for _ in range(100):
    deep = [deep]
ODD = [
    *(None, True, False, 0, -1, 999, 10**30, -(10**30), 10**400, 0.5, -0.0, 1e308, math.inf, math.nan),
    *("", "x", "1e400", "nan", "0", "-1", "\n", "\0\x1b[31m", "é" * 300, "a.b:c", "2020-13-45"),
    *([], [[]], [0] * 50, {}, {"x": 1}, deep),
]
odd = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=20)


@st.composite
def altered(draw: Any, value: Any) -> Any:
    """A nested value with a part of it replaced, removed, renamed or given twice."""
    within = isinstance(value, dict | list) and value and draw(st.integers(0, 3))
    if not within:
        return draw(odd)
    names = list(value) if isinstance(value, dict) else list(range(len(value)))
    name = draw(st.sampled_from(names))
    how = draw(st.sampled_from(["inside", "inside", "removed", "renamed", "twice"]))
    if how == "inside":
        changed: Any = {name: draw(altered(value[name]))}
    elif how == "renamed":
        changed = {draw(st.sampled_from(names) | st.text(max_size=5)): value[name]}
    else:
        changed = {}
    if isinstance(value, dict):
        return {**({k: v for k, v in value.items() if k != name or how == "twice"}), **changed}
    return [*value[:name], *changed.values(), *(value[name:] if how == "twice" else value[name + 1 :])]


# Data sets


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 4), np.uint8)


@by_examples(150)
def test_mutated_idx_files(tmp_path: Path, examples: int) -> None:
    """What is accepted stands in the file."""
    path = tmp_path / "images"

    def examine(content: bytes) -> None:
        path.write_bytes(content)
        found, _ = refusal(lambda: read_idx(path, 3), DataError, path)
        assert found is None or (found.dtype == np.uint8 and idx(found) == content)

    search_damage(idx(PIXELS), examine, examples)


@by_examples(150)
def test_mutated_packed_idx_files(tmp_path: Path, examples: int) -> None:
    """A checksum is in them: nothing else than what was saved is accepted, but another packed file."""
    path = tmp_path / "images.gz"

    def examine(content: bytes) -> None:
        path.write_bytes(content)
        found, _ = refusal(lambda: read_idx(path, 3), DataError, path)
        assert found is None or (found == PIXELS).all()

    search_damage(gzip.compress(idx(PIXELS), mtime=0), examine, examples)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, list[int]]:
    """Pixels and labels of CIFAR-10 files that are small."""
    monkeypatch.setattr(formats, "CIFAR_RECORDS", RECORDS)
    pixels = np.random.default_rng(1).integers(0, 256, (RECORDS, 3072), np.uint8)
    return pixels, [i % 10 for i in range(RECORDS)]


@by_examples(150)
def test_mutated_cifar_files_of_the_binary_version(tmp_path: Path, few: Any, examples: int) -> None:
    """What is accepted stands in the file."""
    path = tmp_path / "data_batch_1.bin"
    pixels, labels = few
    saved = np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1).tobytes()

    def examine(content: bytes) -> None:
        path.write_bytes(content)
        found, _ = refusal(lambda: read_cifar_binary(path), DataError, path)
        if found is not None:
            images, told = found
            assert told.max() < 10
            assert np.concatenate([told[:, None], images.reshape(RECORDS, -1)], axis=1).tobytes() == content

    search_damage(saved, examine, examples)


def python_2(batch: dict[str, Any]) -> bytes:
    """As Python 2 wrote the published files: every text one of bytes."""
    pixels = batch["data"].tobytes()
    text = [b"\x80\x02}q\x01("]
    for key, value in batch.items():
        text.append(b"U" + bytes([len(key)]) + key.encode() + b"q\x02")
        if key == "data":
            text.append(
                b"cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05(K\x01"
            )
            text.append(b"".join(b"M" + size.to_bytes(2, "little") for size in value.shape) + b"\x86")
            text.append(
                b"cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
            )
            text.append(b"\x89T" + len(pixels).to_bytes(4, "little") + pixels + b"tb")
        else:
            text.append(b"]q\x08(" + b"".join(b"K" + bytes([label]) for label in value) + b"e")
    return b"".join([*text, b"u."])


@by_examples(150)
@pytest.mark.parametrize("protocol", ["Python 2", 2, 4, 5])
def test_mutated_cifar_files_of_the_python_version(
    tmp_path: Path, few: Any, protocol: Any, examples: int
) -> None:
    """What is accepted has the pixels that stand in the file."""
    path = tmp_path / "data_batch_1"
    pixels, labels = few
    batch = {"data": pixels, "labels": labels}
    saved = python_2(batch) if protocol == "Python 2" else pickle.dumps(batch, protocol)

    def examine(content: bytes) -> None:
        path.write_bytes(content)
        found, _ = refusal(lambda: read_cifar_python(path), DataError, path)
        if found is not None:
            images, told = found
            assert images.shape == (RECORDS, 3, 32, 32) and told.shape == (RECORDS,) and told.max() < 10
            rows = images.reshape(RECORDS, -1)
            texts = [rows.tobytes("C"), rows.tobytes("F")]  # in the order that the file tells of
            assert any(t in content or t.decode("latin1").encode() in content for t in texts)
            assert content != saved or ((rows == pixels).all() and (told == labels).all())

    examine(saved)
    assert refusal(lambda: read_cifar_python(path), DataError, path)[0] is not None
    search_damage(saved, examine, examples // 4)


class Call:
    """What a pickle may ask for."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None):
        self.asked = (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.asked


BOMBS: dict[str, Any] = {
    "an array of terabytes": lambda: pickle.dumps({"data": Call(np.ndarray, (10**12,)), "labels": []}, 2),
    "by numpy's own helper": lambda: pickle.dumps(
        {"data": Call(np.zeros(0).__reduce__()[0], np.ndarray, (10**12,), b"b")}, 2
    ),
    "a dtype with a state": lambda: pickle.dumps(
        {"data": Call(np.dtype, "u1", state=(3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 10**9, 1, 63))},
        2,
    ),
    "a place in the memo": lambda: b"\x80\x02]r\xff\xff\xff\x7f.",
    "many sets": lambda: b"\x80\x04" + b"\x8f" * 50_000 + b".",
    "labels within labels": lambda: (
        b"\x80\x02]q\x00"
        + b"".join(b"](" + b"h" + bytes([k]) + b"h" + bytes([k]) + b"eq" + bytes([k + 1]) for k in range(60))
        + b"."
    ),
    "a key that takes for ever to hash": lambda: (
        b"\x80\x02)"
        + b"".join(b"q" + bytes([k]) + b"h" + bytes([k]) + b"\x86" for k in range(100))
        + b"}q\xff0}q\xfehcK\x01s."
    ),
    "a long text": lambda: b"\x80\x02X\xff\xff\xff\x7fabc.",
    "an endless number": lambda: b"\x80\x02L" + b"9" * 100_000 + b"L\n.",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_pickles_that_ask_for_more_than_a_batch_needs(tmp_path: Path, few: Any, bomb: str) -> None:
    path = tmp_path / "data_batch_1"
    path.write_bytes(BOMBS[bomb]())
    assert refusal(lambda: read_cifar_python(path), DataError, path)[1]


def test_data_files_that_would_fill_the_memory(tmp_path: Path) -> None:
    """By what they unpack to, by their size, by what their header says."""
    bomb, big, header = (tmp_path / name for name in ("a.gz", "b", "c.gz"))
    head = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (6 << 20, 32, 32))
    with gzip.open(bomb, "wb", compresslevel=1) as file:
        file.write(head)
        for _ in range(257):
            file.write(bytes(1 << 20))
    assert bomb.stat().st_size < 3_000_000
    with open(big, "wb") as plain:
        plain.write(head)
        plain.truncate(6 << 30)
    header.write_bytes(gzip.compress(head))
    for path, told in (
        (bomb, "more than"),
        (big, "more than"),
        (header, "truncated: expected 6442450960 bytes"),
    ):
        assert told in refusal(lambda path=path: read_idx(path, 3), DataError, path)[1]  # type: ignore[misc]
    for read in (read_cifar_binary, read_cifar_python):
        assert "more than" in refusal(lambda read=read: read(big), DataError, big)[1]  # type: ignore[misc]


# Configurations

CONFIG = {
    **{"data": "digits", "model": "mlp", "method": "LSGD", "pull": 0.1, "period": 16, "loss_window": 10},
    **{"lr": 0.1, "lr_drops": [3, 5], "batch_size": 32, "epochs": 3, "eval_every": "20 steps", "seed": 0},
    **{"threads": 1, "patience": 60.0, "slow": "1:3", "global_period": None},
}


def understood(path: Path, content: bytes) -> None:
    """A configuration whose every value is in its range, or a line for each mistake."""
    path.write_bytes(content)
    try:
        config = parse([str(path)])
    except ConfigError as error:
        assert error.mistakes
        for told in error.mistakes:
            assert told.isprintable() and len(told) < 3000, told  # the longest name twice, and more
        return
    assert not config.mistakes()
    again = path.with_name("again.yaml")
    again.write_text(config.text())
    assert parse([str(again)]) == config


@by_examples(40)
def test_mutated_configurations(tmp_path: Path, examples: int) -> None:
    text = yaml.safe_dump(CONFIG).encode()
    search_damage(text, lambda content: understood(tmp_path / "c.yaml", content), examples // 2)


@by_examples(40)
def test_mutated_configurations_of_odd_values(tmp_path: Path, examples: int) -> None:
    def examine(value: Any) -> None:
        understood(tmp_path / "c.yaml", yaml.safe_dump(value).encode())

    search(altered(CONFIG), examine, examples // 2)


# Checkpoints

STATE = {"x": torch.arange(6.0).reshape(2, 3), "t": 5, "more": [{"lr": 0.1, "name": "SGD"}, None, (1, 2.5)]}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    directory.claim("lr: 0.1\n")
    directory.seal(3, [directory.save(rank, 3, STATE) for rank in range(2)])
    return directory


@by_examples(150)
def test_mutated_manifests(run: RunDirectory, examples: int) -> None:
    """One that is accepted is the one that was written."""
    saved = manifest.read(run.manifest)
    content = run.manifest.read_bytes()
    fields = json.loads(content)

    def examine(content: bytes) -> None:
        run.manifest.write_bytes(content)
        found, _ = refusal(lambda: manifest.read(run.manifest), InputError, run.manifest)
        assert found is None or found == saved

    search_damage(content, examine, examples // 2)
    search(altered(fields).map(lambda value: json.dumps(value).encode()), examine, examples // 2)


@by_examples(150)
def test_mutated_rank_files(run: RunDirectory, examples: int) -> None:
    path = run.checkpoint / manifest.file_name(3, 1)
    content = path.read_bytes()

    def examine(mutant: bytes) -> None:
        path.write_bytes(mutant)
        _, told = refusal(lambda: run.load(1, 3), InputError, path)
        assert bool(told) == (mutant != content)

    search_damage(content, examine, examples)


# Runs


METRICS = [
    {
        "step": 40 * i,
        "wall_s": 2.5 * i,
        "grad_evals": 80 * i,
        "test_loss": 1 / (1 + i),
        "test_error": 0.5 / (1 + i),
    }
    | {"rounds": i, "bytes_group": 1000 * i, "bytes_across": 0, "leader": i % 2, "t_compute": 1.5 * i}
    for i in range(5)
]
LEADERS = [{"step": 8 * i, "leaders": [i % 2], "leader": i % 2} for i in range(1, 5)]
SUMMARY = {
    **{"method": "LSGD", "world_size": 2, "groups": [[0, 1]], "test_error": 0.1, "wall_s": 10.0},
    **{"best_worker": {"rank": 1, "test_error": 0.09}, "resets": [0, 1], "leads": [2, 2], "steps": 160},
    **{"t_compute": [6.0, 6.5], "t_data": [0.1, 0.1], "t_comm": [1.0, 0.5], "t_wait": [0.5, 0.1]},
    **{"worker_steps": [160, 150], "staleness": {"0": 3, "2": 1}, "periods": [[0, 8], [80, 16]]},
    **{"forecast": {"comm": [0.1, 0.2]}, "rounds": 4, "bytes_group": 4000, "bytes_across": 0},
}


@pytest.fixture
def finished(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "finished")
    directory.claim("method: LSGD\nlr: 0.1\n")
    directory.append("metrics.jsonl", METRICS)
    directory.append("leaders.jsonl", LEADERS)
    directory.summarize(SUMMARY)
    return directory


def reported(run: RunDirectory) -> Any:
    """The run as it is read, or None if it is refused. What was left out is told in a line."""
    try:
        (found,) = read_runs([run.path])
    except RunError as error:
        assert str(run.path) in str(error) and str(error).isprintable()
        return None
    assert all(notice.isprintable() for notice in found.notices)
    if found.metrics:
        table([found])
    assert len(found.leads()[0]) < 100_000
    return found


@by_examples(150)
@pytest.mark.parametrize("name", ["metrics.jsonl", "leaders.jsonl"])
def test_mutated_metrics(finished: RunDirectory, name: str, examples: int) -> None:
    """What was changed is told; what was written after it is of a run that was taken up again."""
    path = finished.path / name
    content = path.read_bytes()
    lines = [json.loads(line) for line in content.splitlines()]

    def examine(mutant: bytes) -> None:
        path.write_bytes(mutant)
        found = reported(finished)
        assert found is None or bool(found.notices) or mutant.startswith(content)

    examine(content)
    assert reported(finished).metrics == METRICS and reported(finished).leaders == LEADERS
    rows = altered(lines).map(lambda found: found if isinstance(found, list) else [found])
    search_damage(content, examine, examples // 2)
    text = rows.map(lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode())
    search(text, examine, examples // 2)


@by_examples(150)
def test_mutated_summaries(finished: RunDirectory, examples: int) -> None:
    path = finished.path / "summary.json"
    content = path.read_bytes()
    fields = json.loads(content)

    def examine(mutant: bytes) -> None:
        path.write_bytes(mutant)
        assert reported(finished).metrics == METRICS

    search_damage(content, examine, examples // 2)
    search(altered(fields).map(lambda value: json.dumps(value).encode()), examine, examples // 2)


# Recordings

ABOUT = {"method": "EASGD", "settings": {"period": 2}, "workers": 1, "model": ["w", [3]]}


@by_examples(150)
def test_mutated_recordings(tmp_path: Path, examples: int) -> None:
    """Of tickets that nobody will draw, rows that are missing, and all else: refused."""
    topology = Topology(MPI.COMM_SELF)
    path = tmp_path / "recording"
    course = Course(topology, "free", path, None, ABOUT)
    for t in range(5):
        course.note([t])
        course.meet("center", t)
    course.finish()
    content = path.read_bytes()

    def read() -> Any:
        return Course(topology, "free", None, path, ABOUT)

    def examine(mutant: bytes) -> None:
        path.write_bytes(mutant)
        found, _ = refusal(read, ValueError, path)
        assert found is None or found.script_of(0) == [[t] for t in range(5)]

    examine(content)
    assert read().script_of(0) == [[t] for t in range(5)]
    fields = json.loads(content)
    search_damage(content, examine, examples // 2)
    search(altered(fields).map(lambda value: json.dumps(value).encode()), examine, examples // 2)
    path.write_text(sealed.text({"mpilsgd recording": 1}))
    assert "of format 1" in refusal(read, ValueError, path)[1]
    topology.free()
