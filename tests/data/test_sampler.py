from collections import Counter
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DistributedSampler

from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.data.datasets.shapes import shapes
from mlpmatch_pl.data.sampler import ShardSampler, StreamSampler
from mlpmatch_pl.utils.errors import UserError

sizes, lengths, worlds = st.integers(1, 40), st.integers(1, 60), st.integers(1, 6)
seeds, epochs = st.integers(0, 1000), st.integers(0, 50)
quick = settings(max_examples=60, deadline=None)


def draws(size, num_samples, epoch=0, rank=0, world=1, seed=0, start=0):
    sampler = StreamSampler(size, num_samples, rank, world, seed)
    sampler.set_epoch(epoch)
    sampler.start = start
    return list(sampler)


@quick
@given(sizes, lengths, epochs, worlds, seeds, st.data())
def test_draws_are_a_pure_function_of_seed_and_epoch(size, length, epoch, world, seed, data):
    rank = data.draw(st.integers(0, world - 1))
    used = StreamSampler(size, length, rank, world, seed)
    for other in data.draw(st.lists(epochs, max_size=2)):
        used.set_epoch(other)
        list(used)
    used.set_epoch(epoch)
    assert list(used) == list(used) == draws(size, length, epoch, rank, world, seed)


@quick
@given(sizes, st.integers(1, 10), st.sampled_from([1, 2, 3, 4, 6, 12]), epochs, seeds)
def test_global_batches_are_the_same_draws_for_any_world_size_that_divides(size, steps, world, epoch, seed):
    global_batch = 12
    per_rank = global_batch // world
    ranks = [draws(size, steps * per_rank, epoch, rank, world, seed) for rank in range(world)]
    single = draws(size, steps * global_batch, epoch, 0, 1, seed)
    for step in range(steps):
        dealt = [draw for rank in ranks for draw in rank[step * per_rank : (step + 1) * per_rank]]
        assert sorted(dealt, key=lambda draw: draw[1]) == single[step * global_batch : (step + 1) * global_batch]


@quick
@given(sizes, lengths, epochs, seeds)
def test_every_pass_holds_every_image_exactly_once(size, length, epoch, seed):
    order = [index for index, _ in draws(size, length, epoch, seed=seed)]
    whole = length - length % size
    for start in range(0, whole, size):
        assert sorted(order[start : start + size]) == list(range(size))
    assert len(set(order[whole:])) == length - whole  # the last pass is cut, but repeats nothing either
    assert set(order) <= set(range(size))


@quick
@given(sizes, lengths, worlds, epochs, seeds)
def test_ranks_together_use_all_images_equally(size, length, world, epoch, seed):
    counts = Counter(index for rank in range(world) for index, _ in draws(size, length, epoch, rank, world, seed))
    assert sum(counts.values()) == length * world
    assert max(counts.values()) - (min(counts.values()) if len(counts) == size else 0) <= 1


def test_every_pass_is_shuffled_anew_in_an_epoch_and_over_epochs():
    size, passes = 20, 4
    orders = []
    for epoch in range(5):
        order = [index for index, _ in draws(size, size * passes, epoch)]
        orders += [tuple(order[start : start + size]) for start in range(0, len(order), size)]
    assert len(set(orders)) == 5 * passes
    assert tuple(range(size)) not in orders


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_labeled_image_reaches_every_rank_within_a_few_epochs(world, seed):
    labeled, batch, steps = 12, 2, 18
    for rank in range(world):
        met = {index for epoch in range(3) for index, _ in draws(labeled, steps * batch, epoch, rank, world, seed)}
        assert met == set(range(labeled))


@quick
@given(sizes, lengths, worlds, seeds)
def test_draw_numbers_are_unique_over_ranks_and_epochs(size, length, world, seed):
    numbers = [
        number
        for epoch in range(4)
        for rank in range(world)
        for _, number in draws(size, length, epoch, rank, world, seed)
    ]
    assert sorted(numbers) == list(range(4 * length * world))


@quick
@given(sizes, lengths, epochs, worlds, seeds, st.data())
def test_start_skips_exactly_that_many_draws_once(size, length, epoch, world, seed, data):
    rank, start = data.draw(st.integers(0, world - 1)), data.draw(st.integers(0, length))
    sampler = StreamSampler(size, length, rank, world, seed)
    sampler.set_epoch(epoch)
    whole = list(sampler)
    sampler.start = start
    assert list(sampler) == whole[start:]
    assert list(sampler) == whole  # the next epoch starts at its beginning


@quick
@given(sizes, lengths, worlds)
def test_length_is_the_number_of_draws_of_every_rank(size, length, world):
    samplers = [StreamSampler(size, length, rank, world) for rank in range(world)]
    assert {len(sampler) for sampler in samplers} == {length} == {len(list(sampler)) for sampler in samplers}


def test_labeled_and_unlabeled_streams_are_independent():
    built = SemiSupervisedDataModule(shapes(labeled=20, train=40), crop_size=33, num_workers=0, batch_size=4)
    loaders = built.train_dataloader().iterables
    labeled, unlabeled = ([index for index, _ in loaders[name].sampler] for name in ("labeled", "unlabeled"))
    assert len(labeled) == len(unlabeled) == 20
    assert labeled != unlabeled


def test_streams_of_different_seeds_never_coincide():
    built = [
        SemiSupervisedDataModule(shapes(labeled=20, train=40), crop_size=33, num_workers=0, batch_size=4, seed=seed)
        for seed in range(10)
    ]
    orders = [
        tuple(index for index, _ in loader.sampler)
        for module in built
        for loader in module.train_dataloader().iterables.values()
    ]
    assert len(set(orders)) == 20


@quick
@given(st.integers(0, 60), st.integers(1, 8))
def test_shards_hold_every_image_exactly_once(size, world):
    samplers = [ShardSampler(size, rank, world) for rank in range(world)]
    dealt = [list(sampler) for sampler in samplers]
    assert sorted(index for shard in dealt for index in shard) == list(range(size))
    assert [len(sampler) for sampler in samplers] == [len(shard) for shard in dealt]
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    assert all(shard == sorted(shard) for shard in dealt)


@pytest.mark.parametrize("sampler", [StreamSampler(3, 6), ShardSampler(3)])
def test_samplers_are_of_the_kind_that_lightning_leaves_alone(sampler):
    assert isinstance(sampler, DistributedSampler)


def test_shards_do_not_change_with_the_epoch():
    sampler = ShardSampler(7, 1, 2)
    first = list(sampler)
    sampler.set_epoch(3)
    assert list(sampler) == first == [1, 3, 5]


@contextmanager
def process(rank, world):
    """As in one of several processes that torch knows of; the others need not be there."""
    distributed.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        distributed.destroy_process_group()


def build():
    data = shapes(labeled=20, train=40, val=5, test=3, size=33)
    return SemiSupervisedDataModule(data, crop_size=33, num_workers=0, batch_size=5)


def loaders_of(datamodule):
    streams = datamodule.train_dataloader().iterables
    return [*streams.values(), datamodule.val_dataloader(), datamodule.test_dataloader()]


def test_loaders_from_before_the_other_processes_are_refused():
    """As in ``Trainer(devices=2).fit(module, datamodule.train_dataloader())``: all would train with the same images."""
    loaders = loaders_of(build())
    with process(0, 2):
        for loader in loaders:
            with pytest.raises(UserError, match=r"for 2 processes, but they were created for 1, .* datamodule="):
                next(iter(loader))
    with process(0, 1):
        assert all(next(iter(loader)) for loader in loaders)


def test_loops_without_a_trainer_get_the_share_of_their_process():
    dealt, alone = [], [[*loader.sampler] for loader in loaders_of(build())]
    for rank in range(2):
        with process(rank, 2):
            dealt.append([[*loader.sampler] for loader in loaders_of(build())])
    for single, *ranks in zip(alone, *dealt, strict=True):
        assert sorted([*ranks[0], *ranks[1]]) == sorted(single)
        assert not set(ranks[0]) & set(ranks[1])


def test_a_place_that_is_given_counts():
    with process(1, 2):
        assert [*ShardSampler(5, 0, 1)] == [0, 1, 2, 3, 4]
        assert len([*StreamSampler(5, 5, 0, 1)]) == 5
