"""Which samples a worker sees."""

from __future__ import annotations

import pytest
import torch

from mpilsgd.train.callables import InputError
from mpilsgd.train.sampling import SAMPLINGS, Sampler, derived_seed


def parts(
    kind: str, epoch: int = 0, samples: int = 103, batch: int = 5, size: int = 4, seed: int = 0
) -> list[torch.Tensor]:
    return [Sampler(kind, samples, batch, rank, size, seed).epoch(epoch) for rank in range(size)]


def test_a_partition_is_disjoint_and_drops_the_incomplete_batch() -> None:
    found = parts("partition")
    assert all(part.shape == (5, 5) for part in found)  # 103 // 4 = 25 samples each
    seen = torch.cat([part.flatten() for part in found])
    assert len(seen) == len(seen.unique()) == 100
    assert seen.min() >= 0 and seen.max() < 103


def test_a_partition_that_fits_covers_everything() -> None:
    seen = torch.cat([part.flatten() for part in parts("partition", samples=100)])
    assert torch.equal(seen.sort().values, torch.arange(100))


def test_a_partition_is_fresh_every_epoch() -> None:
    first, second = parts("partition", 0), parts("partition", 1)
    assert set(first[0].flatten().tolist()) != set(second[0].flatten().tolist())


def test_shuffle_gives_every_worker_the_whole_set_in_its_own_order() -> None:
    found = parts("shuffle", samples=100)
    for part in found:
        assert part.shape == (20, 5)
        assert torch.equal(part.flatten().sort().values, torch.arange(100))
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], parts("shuffle", 1, samples=100)[0])


def test_replacement_draws_independently() -> None:
    found = parts("replacement", samples=1000, batch=10)
    assert all(part.shape == (25, 10) for part in found)
    flat = [part.flatten() for part in found]
    assert len(flat[0].unique()) < 250 and not torch.equal(flat[0], flat[1])


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_the_seed_decides(kind: str) -> None:
    one, same, other = (parts(kind, 3, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_global_random_numbers_are_left_alone(kind: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sampler = Sampler(kind, 100, 5, 1, 4)
    sampler.epoch(0)
    sampler.augmentation(0, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_every_batch_has_its_own_augmentation() -> None:
    samplers = [Sampler("partition", 100, 5, rank, 2) for rank in range(2)]
    draws = [
        torch.rand(4, generator=s.augmentation(e, b)) for s in samplers for e in range(3) for b in range(3)
    ]
    assert len({tuple(draw.tolist()) for draw in draws}) == 18
    assert torch.equal(draws[0], torch.rand(4, generator=samplers[0].augmentation(0, 0)))


def test_seeds_do_not_collide() -> None:
    seeds = {
        derived_seed(s, p, *q)
        for s in range(3)
        for p in ("a", "b")
        for q in ((), (0,), (0, 0), (1,), (0, 1), (1, 0))
    }
    assert len(seeds) == 36
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_more_workers_than_samples() -> None:
    with pytest.raises(InputError, match="8 workers, but only 5 training sample"):
        Sampler("partition", 5, 1, 0, 8)
    with pytest.raises(InputError, match="8 workers, but only 5 training sample"):
        Sampler("replacement", 5, 1, 0, 8)


def test_a_batch_that_cannot_be_filled() -> None:
    with pytest.raises(
        InputError, match=r"batch_size=30 cannot be filled: each of 4 workers has 25 of the 100.*at most 25"
    ):
        Sampler("partition", 100, 30, 0, 4)
    assert Sampler("shuffle", 100, 30, 0, 4).batches == 3


def test_unknown_kind() -> None:
    with pytest.raises(
        InputError, match="sampling must be one of partition, shuffle, replacement, not 'all'"
    ):
        Sampler("all", 10, 1)
