"""Data sets of the user's: read as they are needed, by whom and whenever; tables, texts and pictures without code."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpilsgd.train import text
from mpilsgd.train.batches import Batches
from mpilsgd.train.data import MapSet, TensorSet, load
from mpilsgd.train.formats import DataError
from mpilsgd.train.image_folder import ImageFolder
from mpilsgd.train.loading import StreamSet
from mpilsgd.train.samples import Reading
from mpilsgd.train.sampling import Sampler, StreamSampler, random_state


class Drawing(torch.utils.data.Dataset):
    """Draws from every global generator."""

    def __len__(self) -> int:
        return 14

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([i, float(torch.rand(())), random.random(), np.random.rand()]), i % 2


class Counting(torch.utils.data.IterableDataset):
    """0, 1, 2, ... with a random number each; every pass begins at another place."""

    def __init__(self, count: int):
        self.count, self.begin = count, 0

    def set_epoch(self, number: int) -> None:
        self.begin = 100 * number

    def __iter__(self) -> Iterator[torch.Tensor]:
        for i in range(self.begin, self.begin + self.count):
            yield torch.tensor([i, float(torch.rand(()))])


class Known(Counting):
    def __len__(self) -> int:
        return self.count


def taken(batches: Batches, numbers: range) -> torch.Tensor:
    return torch.stack([batches.take(n)[0] for n in numbers])


def test_samples_are_the_same_whoever_reads_them_and_when() -> None:
    sampler = Sampler("partition", 14, 3, rank=1, size=2, seed=5)  # 2 batches an epoch
    own = Batches(MapSet(Drawing(), 2), sampler)
    before = random_state()
    expected = taken(own, range(6))
    assert str(random_state()) == str(before)
    assert not torch.equal(expected[0], expected[2])
    late = Batches(MapSet(Drawing(), 2), sampler)  # as after a resumption
    assert torch.equal(taken(late, range(3, 6)), expected[3:])
    read = MapSet(Drawing(), 2, Reading(workers=1))
    others = Batches(read, sampler)
    assert torch.equal(taken(others, range(2)), expected[:2])
    assert multiprocessing.active_children()
    for reader in multiprocessing.active_children():  # a launcher sends its signals to all processes
        assert reader.pid is not None
        os.kill(reader.pid, signal.SIGUSR1)
        os.kill(reader.pid, signal.SIGTERM)
    assert torch.equal(taken(others, range(2, 6)), expected[2:])
    assert torch.equal(taken(others, range(1, 3)), expected[1:3])  # by the same process
    assert str(random_state()) == str(before)
    assert [n for _, n in read.share(0, 1)] == [14]


def test_what_cannot_be_sent_to_a_worker() -> None:
    class Local(Drawing): ...

    with pytest.raises(ValueError, match=r"cannot be sent to another process .*: take --workers 0"):
        next(MapSet(Local(), 2, Reading(workers=1)).training(Sampler("partition", 14, 3), 0))


def test_batches_a_step_are_not_cut_at_the_end_of_an_epoch() -> None:
    sampler = Sampler("partition", 35, 3, accumulate=4)
    assert sampler.batches == 2 and sampler.epoch(0).shape == (8, 3)
    assert torch.equal(sampler.epoch(0), Sampler("partition", 35, 3).epoch(0)[:8])
    with pytest.raises(
        ValueError, match=r"batch_size=3 cannot be filled: .* at most 35 in accumulate=12 batches"
    ):
        Sampler("partition", 35, 3, accumulate=12)


def stream(
    data: Any, rank: int = 0, size: int = 1, batches: int = 2, number: int = 0, workers: int = 0
) -> Any:
    sampler = StreamSampler(batches, 3, rank, rank, size, 7, 1)
    return StreamSet(data, None, Reading(workers=workers, batch_size=3)).training(sampler, number)


def numbers(batches: Iterator[torch.Tensor], count: int) -> list[list[int]]:
    return [batch[:, 0].int().tolist() for batch in itertools.islice(batches, count)]


def test_a_stream_is_dealt_out_to_the_ranks() -> None:
    first, second = (numbers(stream(Counting(13), rank, 2), 3) for rank in (0, 1))
    assert first == [[0, 2, 4], [6, 8, 10], [100, 102, 104]]
    assert second == [[1, 3, 5], [7, 9, 11], [101, 103, 105]]


@pytest.mark.parametrize("kind", [Counting, Known])
def test_a_stream_is_taken_up_where_it_was(kind: type[Counting]) -> None:
    before = random_state()
    whole = [next(batches) for batches in [stream(kind(13), 1, 2)] for _ in range(5)]
    for number in (1, 2, 3, 4):
        assert torch.equal(next(stream(kind(13), 1, 2, number=number)), whole[number])
    assert str(random_state()) == str(before)


def test_a_stream_that_another_process_reads() -> None:
    own = stream(Counting(13), 1, 2)
    other = stream(Counting(13), 1, 2, workers=2)
    assert all(torch.equal(next(own), next(other)) for _ in range(5))


def test_streams_that_end_too_early() -> None:
    with pytest.raises(DataError, match=r"gave worker 0 0 batch\(es\) of 3; it is too short"):
        next(stream(Counting(2)))
    with pytest.raises(DataError, match=r"gave worker 0 2 batch\(es\) of 3; by its len\(\) it has 4"):
        list(itertools.islice(stream(Known(7), batches=4), 4))
    with pytest.raises(DataError, match="used up after one pass"):
        StreamSet(iter([1, 2]), None)
    with pytest.raises(DataError, match="holds no samples"):
        StreamSet(Counting(0), None).first()


def test_the_test_set_is_shared_out_too() -> None:
    data = StreamSet(Counting(8), None, Reading(batch_size=3))
    assert [(batch[:, 0].tolist(), n) for batch, n in data.share(1, 2)] == [([1, 3, 5], 3), ([7], 1)]
    data.whole = False
    assert sum(n for _, n in data.share(1, 2)) == 8


# Without code


def csv(folder: Path, content: str, name: str = "t.csv") -> str:
    (folder / name).write_text(content)
    return str(folder / name)


def test_a_table_of_classes(tmp_path: Path) -> None:
    rows = "\n".join(f"{i},{2 * i + 1}, 7, {i % 3}" for i in range(20))
    train, test = load(csv(tmp_path, "a,b,c,kind\n" + rows + "\n\n"), seed=3)
    assert isinstance(train, TensorSet) and (len(train), len(test), train.classes) == (16, 4, 3)
    assert torch.allclose(train.inputs.mean(0), torch.zeros(3), atol=1e-6)
    assert torch.allclose(train.inputs.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]))
    again = load(csv(tmp_path, rows), seed=3)[0]
    assert torch.equal(again.labels, train.labels) and train.labels.dtype == torch.int64
    assert not torch.equal(load(csv(tmp_path, rows), seed=4)[0].inputs, train.inputs)


def test_a_table_of_numbers(tmp_path: Path) -> None:
    train, test = load(csv(tmp_path, "1,0.5\n2,1\n", "a.csv") + "," + csv(tmp_path, "3,4\n", "b.csv"))
    assert train.classes is None and train.labels.tolist() == [0.5, 1.0] and test.labels.tolist() == [4.0]
    assert test.inputs.tolist() == [[3.0]]
    whole = csv(tmp_path, "\n".join(f"{i},{i % 2}" for i in range(10)))
    assert load(whole, reading=Reading(loss="mse"))[0].labels.dtype == torch.float32


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1,2\n3,x\n", "line 2: column 2 holds 'x', which is no number"),
        ("1,2\n3,4,5\n", "line 2: 3 values; the rows before have 2"),
        ("1,2\n3,nan\n", "line 2: holds a value that is not finite"),
        ("a,b\n", "holds no rows of numbers"),
        ("1\n2\n", "needs two columns at least"),
        ("1,2\n", "too few rows"),
        ("1,2\n1,99999\n1,3\n", "whole numbers up to 99999, .* --loss mse"),
        ("1,-1\n1,0\n1,1\n", "is below 0"),
        ("1,2\n3,\xff\n", "line 2: column 2 holds 'ÿ', which is no number"),
    ],
)
def test_bad_tables(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"t\.csv.*{message}"):
        load(csv(tmp_path, content))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for name in ("t.csv", "t.npz", "t.txt"):
        with pytest.raises(DataError, match=rf"{name}: no such file"):
            load(str(tmp_path / name))


def test_arrays(tmp_path: Path) -> None:
    x, y = np.arange(12).reshape(6, 2), np.array([0, 1, 2, 0, 1, 2])
    file = str(tmp_path / "a.npz")
    np.savez(file, x_train=x, y_train=y, x_test=x[:1], y_test=y[:1])
    train, _ = load(file)
    assert (train.classes, train.inputs.dtype, len(train)) == (3, torch.float32, 6)
    np.savez(file, x_train=x, y_train=y / 2, x_test=x[:1], y_test=y[:1] / 2)
    assert load(file)[0].classes is None
    np.savez(file, x_train=x, y_train=y)
    with pytest.raises(DataError, match=r"a\.npz: lacks x_test, y_test; it holds x_train, y_train"):
        load(file)
    np.savez(file, x_train=x, y_train=y.astype(object), x_test=x, y_test=y)
    with pytest.raises(DataError, match=r"a\.npz: is no .npz file of plain arrays"):
        load(file)
    Path(file).write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(DataError, match=r"a\.npz: is no .npz file"):
        load(file)


def test_a_text_is_cut_into_pieces_with_what_follows(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("añ" * 5000, "utf-8")
    train, test = load(str(tmp_path / "t.txt"))
    assert (train.classes, train.input_shape, len(train), len(test)) == (2, (128,), 70, 7)
    inputs, targets = train.batch(torch.tensor([0, 69]))
    assert inputs.shape == targets.shape == (2, 128) and inputs[0, :4].tolist() == [0, 1, 0, 1]
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    shifted = train.batch(torch.arange(70), torch.Generator().manual_seed(1))[0]
    assert 20 < int(shifted[:, 0].sum()) < 50  # half of the shifts are odd
    (tmp_path / "t.txt").write_text("short")
    with pytest.raises(DataError, match=r"t\.txt: has 5 characters; a language model needs 1290 at least"):
        load(str(tmp_path / "t.txt"))
    (tmp_path / "t.txt").write_bytes(b"ab\xff" * 999)
    with pytest.raises(DataError, match=r"t\.txt: is no text in UTF-8: byte 2 is 0xff"):
        load(str(tmp_path / "t.txt"))


def test_the_library_s_sources_are_a_text() -> None:
    train, test = text.library()
    assert 80 < train.classes < 129 and len(train) > 10_000 and len(test) == 511


def pictures(folder: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    for part, name, count in (("train", "cat", 3), ("train", "dog", 2), ("val", "cat", 1), ("val", "dog", 1)):
        (folder / part / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((300, 400, 3), 40 * i + 100 * (name == "dog"), np.uint8)
            image.fromarray(pixels).save(folder / part / name / f"{i}.png")
    return folder


def test_a_folder_of_images(tmp_path: Path) -> None:
    train, test = load(str(pictures(tmp_path)))
    assert isinstance(train, MapSet) and (len(train), len(test)) == (5, 2)
    assert train.classes == 2 and train.input_shape == (3, 224, 224)
    inputs, labels = test.batch(torch.arange(2))
    assert labels.tolist() == [0, 1]
    assert inputs[1, 0, 5, 5] == pytest.approx((100 / 255 - 0.485) / 0.229, abs=1e-5)
    assert train.batch(torch.arange(5), torch.Generator().manual_seed(1))[0].shape == (5, 3, 224, 224)


def test_parts_of_images_are_random_and_lie_inside() -> None:
    from mpilsgd.train.image_folder import _random_part

    image = pytest.importorskip("PIL.Image")
    ramp = np.zeros((60, 80, 3), np.uint8)
    ramp[:, :, 0], ramp[:, :, 1] = np.arange(80)[None, :] * 3, np.arange(60)[:, None] * 4
    torch.manual_seed(0)
    seen = [np.array(_random_part(image.fromarray(ramp))).astype(float) for _ in range(60)]
    mirrored = [one[0, 0, 0] > one[0, -1, 0] for one in seen]
    assert 15 < sum(mirrored) < 45 and all(one.shape == (224, 224, 3) for one in seen)
    widths = np.array([np.ptp(one[:, :, 0]) / 237 for one in seen])
    heights = np.array([np.ptp(one[:, :, 1]) / 236 for one in seen])
    assert widths.min() < 0.5 and widths.max() > 0.85 and 0.07 < (widths * heights).min() < 0.3


def test_bad_folders_of_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train: no such folder; a folder of images holds"):
        load(str(tmp_path))
    folder = pictures(tmp_path)
    (folder / "train" / "cat" / "1.png").write_bytes(b"no image")
    data = MapSet(ImageFolder(folder / "train", False), 2)
    with pytest.raises(DataError, match=r"cat/1\.png: is no image"):
        data.batch(torch.arange(2))
    (folder / "val" / "dog").rename(folder / "val" / "fox")
    with pytest.raises(DataError, match="the class dog is not in both train/ and val/"):
        load(str(folder))
