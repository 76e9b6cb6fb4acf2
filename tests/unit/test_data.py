"""Data files, read and refused; batches as they should look."""

from __future__ import annotations

import gzip
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpilsgd.train import problem
from mpilsgd.train.config import Config
from mpilsgd.train.data import Augmentation, ImageSet, MapSet, TensorSet, load
from mpilsgd.train.formats import DataError, read_cifar_binary, read_cifar_python, read_digits, read_idx
from mpilsgd.train.task import Regression

RECORD = 3073


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def mnist(folder: Path, packed: bool = False, **changed: bytes) -> None:
    """A small data set in MNIST's format; a file's content may be changed by its first word."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("t10k", 10)):
        images, labels = rng.integers(0, 256, (count, 28, 28)), np.arange(count) % 10
        for kind, array, d in (("images", images, 3), ("labels", labels, 1)):
            content = changed.get(f"{part}_{kind}", idx(array))
            name = f"{part}-{kind}-idx{d}-ubyte"
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


def test_digits_are_the_real_ones() -> None:
    (images, labels), (test_images, test_labels) = read_digits()
    assert images.shape == (1437, 1, 8, 8) and test_images.shape == (360, 1, 8, 8)
    together = np.concatenate([labels, test_labels])
    assert np.bincount(together).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert images.max() == 16 and images.min() == 0
    assert np.bincount(test_labels).min() >= 35
    pixels = [array.reshape(len(array), -1) for array in (images, test_images)]
    assert not {row.tobytes() for row in pixels[0]} & {row.tobytes() for row in pixels[1]}


def test_digits_are_normalised() -> None:
    train, test = load("digits")
    inputs, targets = train.batch(torch.arange(len(train)))
    assert inputs.dtype == torch.float32 and targets.dtype == torch.int64
    assert abs(float(inputs.mean())) < 0.01 and abs(float(inputs.std()) - 1) < 0.01
    assert train.input_shape == test.input_shape == (1, 8, 8) and train.classes == 10


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("folder", ["", "mnist", "MNIST/raw"])
def test_mnist(tmp_path: Path, packed: bool, folder: str) -> None:
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    mnist(tmp_path / folder, packed)
    train, test = load("mnist", str(tmp_path))
    assert (len(train), len(test), train.input_shape) == (20, 10, (1, 28, 28))
    assert test.batch(torch.tensor([3]))[1].item() == 3


def test_fashion_mnist_has_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "fashion-mnist").mkdir()
    mnist(tmp_path / "fashion-mnist")
    assert len(load("fashion-mnist", str(tmp_path))[0]) == 20


def test_idx_truncated_names_file_and_sizes(tmp_path: Path) -> None:
    content = idx(np.zeros((20, 28, 28)))
    mnist(tmp_path, train_images=content[:-7])
    with pytest.raises(
        DataError, match=r"train-images-idx3-ubyte: truncated: expected 15696 bytes.*found 15689"
    ):
        load("mnist", str(tmp_path))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_images": b""}, "expected magic 00 00 08 03, found nothing"),
        ({"train_images": b"\x00\x00"}, "truncated: expected 16 bytes"),
        ({"train_images": b"\x00\x00\x08\x03\x00\x00"}, "truncated: expected 16 bytes"),
        ({"train_images": idx(np.zeros(20))}, "not an idx file of 3 dimension.*found 00 00 08 01"),
        ({"train_images": b"<html>not here</html>"}, "not an idx file"),
        ({"train_images": idx(np.zeros((20, 28, 28))) + b"x"}, "too long: expected 15696 bytes.*found 15697"),
        ({"train_labels": idx(np.arange(20))}, "label 10 of sample 10 is outside 0..9"),
        ({"train_labels": idx(np.zeros(19))}, "19 labels, but train-images-idx3-ubyte has 20 images"),
        ({"t10k_images": idx(np.zeros((10, 27, 28)))}, "test images are"),
        ({"t10k_images": idx(np.zeros((0, 28, 28))), "t10k_labels": idx(np.zeros(0))}, "no samples"),
    ],
)
def test_wrong_idx_files(tmp_path: Path, changed: dict[str, bytes], message: str) -> None:
    mnist(tmp_path, **changed)
    with pytest.raises(DataError, match=message):
        load("mnist", str(tmp_path))


def test_idx_with_absurd_sizes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes([0, 0, 8, 3]) + b"\xff" * 12)
    with pytest.raises(DataError, match="truncated: expected 79228162458924105385300197391 bytes"):
        read_idx(tmp_path / "f", 3)


def test_truncated_gzip(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    packed = gzip.compress(idx(rng.integers(0, 256, (20, 28, 28))))
    (tmp_path / "a.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"a.gz: truncated gzip file: expected 15696 bytes.*found \d+"):
        read_idx(tmp_path / "a.gz", 3)
    (tmp_path / "b.gz").write_bytes(packed[:-4])  # all bytes there, the checksum cut
    with pytest.raises(DataError, match="truncated gzip file"):
        read_idx(tmp_path / "b.gz", 3)
    (tmp_path / "c.gz").write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match="not a gzip file"):
        read_idx(tmp_path / "c.gz", 3)


def test_missing_files_say_where_they_were_looked_for(tmp_path: Path) -> None:
    for name in ("mnist", "cifar10"):
        with pytest.raises(DataError, match=r"not found; looked in .*--data_dir") as caught:
            load(name, str(tmp_path / "nowhere"))
        assert str(tmp_path / "nowhere") in str(caught.value)


def cifar_file(path: Path, size: int = 10_000 * RECORD) -> Path:
    """A sparse file: black images of class 0."""
    with open(path, "wb") as file:
        file.truncate(size)
    return path


def test_cifar_binary(tmp_path: Path) -> None:
    path = cifar_file(tmp_path / "data_batch_1.bin")
    with open(path, "r+b") as file:
        file.seek(RECORD)
        file.write(bytes([7]) + bytes(range(256)) * 12)
    images, labels = read_cifar_binary(path)
    assert images.shape == (10_000, 3, 32, 32)
    assert labels[:3].tolist() == [0, 7, 0]
    assert images[1, 0, 0, :4].tolist() == [0, 1, 2, 3]
    assert images[1].reshape(-1).tolist() == list(range(256)) * 12


def test_cifar_binary_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"truncated: expected 30730000 bytes.*found 30730"):
        read_cifar_binary(cifar_file(tmp_path / "a.bin", 10 * RECORD))
    path = cifar_file(tmp_path / "b.bin")
    with open(path, "r+b") as file:
        file.write(bytes([11]))
    with pytest.raises(DataError, match="label 11 of sample 0"):
        read_cifar_binary(path)
    for i in (1, 2, 4, 5):
        os.link(path, tmp_path / f"data_batch_{i}.bin")
    with pytest.raises(DataError, match=r"incomplete CIFAR-10: data_batch_3.bin, test_batch.bin missing"):
        load("cifar10", str(tmp_path))


@pytest.mark.parametrize("as_bytes", [False, True])
def test_cifar_python(tmp_path: Path, as_bytes: bool) -> None:
    pixels = np.zeros((10_000, 3072), np.uint8)
    pixels[1] = np.arange(3072) % 256
    batch: dict[Any, Any] = {"data": pixels, "labels": [i % 10 for i in range(10_000)], "batch_label": "one"}
    batch = {key.encode() if as_bytes else key: value for key, value in batch.items()}
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(batch, protocol=2))
    images, labels = read_cifar_python(tmp_path / "data_batch_1")
    assert images.shape == (10_000, 3, 32, 32) and labels[13] == 3
    assert images[1, 0, 0, 5] == 5


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch hacked",)


def test_cifar_python_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({"data": Evil(), "labels": []}))
    with pytest.raises(DataError, match="asks for"):
        read_cifar_python(tmp_path / "data_batch_1")
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"data": np.zeros((9, 3072), np.uint8), "labels": [0] * 9},
            r"expected data of uint8 \(10000, 3072\), found uint8",
        ),
        ({"labels": [0]}, "found NoneType"),
        ([1, 2], "found NoneType"),
        (
            {"data": np.zeros((10_000, 3072), np.uint8), "labels": [0] * 9},
            "expected 10000 whole numbers as labels",
        ),
    ],
)
def test_cifar_python_refused(tmp_path: Path, batch: Any, message: str) -> None:
    (tmp_path / "b").write_bytes(pickle.dumps(batch))
    with pytest.raises(DataError, match=message):
        read_cifar_python(tmp_path / "b")
    (tmp_path / "b").write_bytes(pickle.dumps(batch)[:-5])
    with pytest.raises(DataError, match="truncated"):
        read_cifar_python(tmp_path / "b")


def test_cifar10_is_cropped_by_default(tmp_path: Path) -> None:
    first = cifar_file(tmp_path / "data_batch_1.bin")
    for name in ("data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        os.link(first, tmp_path / f"{name}.bin")
    train, test = load("cifar10", str(tmp_path))
    assert (len(train), len(test), train.input_shape) == (50_000, 10_000, (3, 28, 28))
    inputs, _ = train.batch(torch.tensor([0, 5]), torch.Generator())
    black = (
        torch.tensor([-0.4914 / 0.2023, -0.4822 / 0.1994, -0.4465 / 0.2010])
        .view(3, 1, 1)
        .expand(2, 3, 28, 28)
    )
    torch.testing.assert_close(inputs, black)


def image_set(count: int = 40, edge: int = 6, channels: int = 2, **augmentation: Any) -> ImageSet:
    """Images whose pixels say where they come from: 10 row + column, and 100 more in the second channel."""
    rows, columns = np.meshgrid(np.arange(edge), np.arange(edge), indexing="ij")
    image = np.stack([10 * rows + columns + 100 * c for c in range(channels)]).astype(np.uint8)
    labels = np.arange(count) % 10
    images = np.repeat(image[None], count, axis=0)
    return ImageSet((images, labels), 10, [0.0] * channels, [1.0] * channels, Augmentation(**augmentation))


def test_crops_are_squares_of_the_image_at_every_place() -> None:
    data = image_set(400, crop=4)
    inputs, targets = data.batch(torch.arange(400), torch.Generator().manual_seed(1))
    assert inputs.shape == (400, 2, 4, 4) and targets[11] == 1
    corners = inputs[:, 0, 0, 0]
    expected = corners[:, None, None] + 10 * torch.arange(4)[:, None] + torch.arange(4)
    assert torch.equal(inputs[:, 0], expected)
    assert torch.equal(inputs[:, 1], expected + 100)
    assert {int(c) for c in corners} == {10 * i + j for i in range(3) for j in range(3)}


def test_flips_mirror_about_half_of_the_images() -> None:
    inputs, _ = image_set(1000, flip=True).batch(torch.arange(1000), torch.Generator().manual_seed(0))
    plain = image_set(1).batch(torch.tensor([0]))[0][0]
    mirrored = [torch.equal(one, plain.flip(-1)) for one in inputs]
    assert all(m or torch.equal(one, plain) for m, one in zip(mirrored, inputs, strict=True))
    assert 400 < sum(mirrored) < 600


def test_padding_is_black_and_around() -> None:
    data = image_set(500, pad=2, crop=6)
    inputs, _ = data.batch(torch.arange(500), torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(data.images[0].float(), (2, 2, 2, 2))
    places = {(i, j): padded[:, i : i + 6, j : j + 6] for i in range(5) for j in range(5)}
    found = {place for one in inputs for place, view in places.items() if torch.equal(one, view)}
    assert found == set(places)


def test_the_test_view_is_the_centre_and_always_the_same() -> None:
    data = image_set(3, crop=4, flip=True)
    assert torch.equal(
        data.batch(torch.tensor([0]))[0][0, 0], 11 + 10.0 * torch.arange(4)[:, None] + torch.arange(4)
    )
    data = image_set(3, pad=2, crop=6, flip=True)
    assert torch.equal(data.batch(torch.tensor([1]))[0][0], data.images[1].float())


def test_the_same_generator_gives_the_same_views() -> None:
    data = image_set(20, crop=4, flip=True)
    views = [data.batch(torch.arange(20), torch.Generator().manual_seed(seed))[0] for seed in (3, 3, 4)]
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])


def test_augmentation_that_does_not_fit() -> None:
    with pytest.raises(DataError, match="28 x 28"):
        load("digits", augment="crop")
    train, test = load("digits", augment="pad")
    assert train.input_shape == test.input_shape == (1, 8, 8)


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module with a function `data` and gives its path for the configuration."""
    monkeypatch.syspath_prepend(tmp_path)
    count = iter(range(100))

    def make(body: str) -> str:
        name = f"users_data_{tmp_path.name.replace('-', '_')}_{next(count)}"
        text = "import numpy as np\nimport torch\nfrom torch.utils.data import Dataset, TensorDataset\n"
        (tmp_path / f"{name}.py").write_text(text + body)
        return f"{name}:data"

    return make


CLASS = """
class Squares(Dataset):
    classes = "a", "b", "c"
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return torch.full((2, 3), float(i)), i % 3
def data(): return Squares(9), Squares(6)
"""


def test_a_user_s_dataset(users: Callable[[str], str]) -> None:
    train, test = load(users(CLASS))
    assert isinstance(train, MapSet)
    assert (len(train), len(test), train.input_shape, train.classes) == (9, 6, (2, 3), 3)
    inputs, targets = train.batch(torch.tensor([4, 2]))
    assert inputs[0, 0, 0] == 4 and targets.tolist() == [1, 2]


@pytest.mark.parametrize(
    "body",
    [
        "def data(): return (x, y), (x[:1], y[:1])",
        "def data(): return TensorDataset(x, y), TensorDataset(x[:1], y[:1])",
        "def data(): return [(x.numpy(), y.numpy()), (x[:1].numpy(), y[:1].numpy())]",
        "def data(data_dir, seed):\n    assert (data_dir, seed) == ('d', 3)\n    return (x, y), (x[:1], y[:1])",
    ],
)
def test_a_user_s_tensors(users: Callable[[str], str], body: str) -> None:
    given = "x, y = torch.zeros(4, 5), torch.tensor([0, 1, 2, 1])\n"
    train, test = load(users(given + body), "d", seed=3)
    assert isinstance(train, TensorSet)
    assert (len(train), len(test), train.input_shape, train.classes) == (4, 1, (5,), 3)
    assert train.batch(torch.tensor([2]))[0].dtype == torch.float32


@pytest.mark.parametrize("targets", [[[[0.5], [1]], [[2], [-1]]], [[[1], [-1]], [[2], [0.5]]]])
def test_targets_with_a_fraction_make_it_a_regression(users: Callable[[str], str], targets: Any) -> None:
    """In either set, as in a table."""
    body = f"def data(): return [(torch.zeros(2, 2), torch.tensor(t)) for t in {targets}]"
    task, *sets = problem.load(Config(data=users(body)))
    assert isinstance(task, Regression)
    found = [one.batch(torch.tensor([0, 1]))[1] for one in sets]
    assert [f.dtype for f in found] == [torch.float32] * 2 and [f.tolist() for f in found] == targets


def test_a_user_s_bytes_become_numbers_from_0_to_1(users: Callable[[str], str]) -> None:
    body = "def data(): return ((torch.full((2, 3), 255, dtype=torch.uint8), torch.tensor([0, 1])),) * 2"
    assert load(users(body))[0].batch(torch.tensor([0]))[0].tolist() == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def data(): return 3", "must return .training set, test set., not int"),
        ("def data(): return 3, 4", "must be a torch Dataset"),
        ("def data(): return ((torch.zeros(3, 2), torch.tensor([0, 1])),) * 2", "3 inputs, but 2 labels"),
        (
            "def data(): return ((torch.zeros(2, 2), torch.tensor([0.0, 1.0])),) * 2",
            "labels must be whole numbers",
        ),
        (
            "def data(): return ((torch.zeros(2, 2), torch.tensor([0, -1])),) * 2",
            "label -1 of sample 1 is below 0",
        ),
        ("def data(): return ((torch.zeros(0, 2), torch.zeros(0).long()),) * 2", "holds no samples"),
        (
            "def data(): return (torch.zeros(2, 2), torch.tensor([0, 1])), (torch.zeros(1, 2), torch.tensor([7]))",
            "test set: label 7 does not occur in training",
        ),
        (
            "def data(): return (torch.zeros(2, 2), torch.tensor([0, 1])), (torch.zeros(1, 3), torch.tensor([1]))",
            "training inputs have the shape",
        ),
    ],
)
def test_user_s_data_refused(users: Callable[[str], str], body: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(users(body))


def test_user_s_data_augments_itself(users: Callable[[str], str]) -> None:
    with pytest.raises(DataError, match="augment=crop is for the built-in image sets"):
        load(users(CLASS), augment="crop")
