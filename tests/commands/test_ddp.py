import json
from pathlib import Path

import pytest
from helpers import ddp_job
from helpers.processes import ForkedCommand, free_port

from mlpmatch_pl import MLPMatch

LABELED, TRAIN, VAL, EPOCHS = ddp_job.LABELED, ddp_job.TRAIN, ddp_job.VAL, ddp_job.RECORDED_EPOCHS
BATCH = 4  # a global batch; an epoch has three steps


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The trainings and validations of `ddp_job` on two processes."""
    devices, folder = 2, tmp_path_factory.mktemp("job")
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(devices)}
    job = {"cwd": Path(ddp_job.__file__).parents[1], "module": "helpers.ddp_job", **shared}
    processes = [ForkedCommand(str(folder), str(devices), LOCAL_RANK=str(rank), **job) for rank in range(devices)]
    for done in [process.finish() for process in processes]:
        assert done.returncode == 0, done.stderr[-3000:]
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(devices)]


@pytest.fixture(scope="module")
def ranks(job):
    """Two processes, with Lightning's default of distributed samplers, which must leave the data module's alone."""
    return [rank["recorded"] for rank in job[1]]


@pytest.fixture(scope="module")
def single():
    return json.loads(json.dumps(ddp_job.record(1)))


def test_both_ranks_take_every_step(ranks):
    assert [rank["steps"] for rank in ranks] == [3 * EPOCHS] * 2


def test_ranks_deactivate_the_same_blocks_and_others_at_other_steps(ranks):
    first, second = (rank["blocks"] for rank in ranks)
    assert first == second
    assert [step for step, _ in first] == list(range(3 * EPOCHS))
    assert len({tuple(blocks) for _, blocks in first}) > 1


def test_parameters_stay_in_sync(ranks):
    assert ranks[0]["before"] == ranks[1]["before"]
    assert ranks[0]["after"] == ranks[1]["after"] != ranks[0]["before"]


@pytest.mark.parametrize("stream", ["LabeledDataset", "UnlabeledDataset"])
def test_ranks_share_every_global_batch_of_the_single_process(ranks, single, stream):
    share = BATCH // 2
    steps = [[rank[stream][start : start + share] for rank in ranks] for start in range(0, 3 * EPOCHS * share, share)]
    for step, (first, second) in enumerate(steps):
        assert not {draw for _, draw in first} & {draw for _, draw in second}
        assert sorted(first + second, key=lambda draw: draw[1]) == single[stream][step * BATCH : (step + 1) * BATCH]
    assert sum(len(rank[stream]) for rank in ranks) == len(single[stream]) == 3 * EPOCHS * BATCH


def test_every_labeled_image_reaches_both_ranks(ranks):
    for rank in ranks:
        assert {index for index, _ in rank["LabeledDataset"]} == set(range(LABELED))


def test_ranks_together_use_every_unlabeled_image_once_an_epoch(ranks):
    for epoch in range(EPOCHS):
        draws = [rank["UnlabeledDataset"][6 * epoch : 6 * (epoch + 1)] for rank in ranks]
        assert sorted(index for rank in draws for index, _ in rank) == list(range(TRAIN - LABELED))


def test_every_validation_image_is_counted_once(ranks, single):
    assert sorted(ranks[0]["validated"] + ranks[1]["validated"]) == list(range(VAL)) == single["validated"]
    assert len(ranks[0]["validated"]) != len(ranks[1]["validated"])  # five images, two ranks
    for epoch in range(EPOCHS):
        shares = [[0, 2, 4], [1, 3]]
        assert [
            rank["EvalDataset"][epoch * len(share) : (epoch + 1) * len(share)]
            for rank, share in zip(ranks, shares, strict=True)
        ] == shares
    assert sum(map(sum, ranks[0]["counts"])) == VAL * 48 * 48


def test_metrics_equal_those_of_a_single_process(ranks, single):
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    assert set(single["metrics"]) == set(ranks[0]["metrics"])
    for key, value in single["metrics"].items():
        assert ranks[0]["metrics"][key] == pytest.approx(value, abs=1e-6)
    assert 0 < single["metrics"]["val/miou"] < 1


def test_samplers_are_left_alone(ranks):
    assert [rank["samplers"] for rank in ranks] == [["StreamSampler", "StreamSampler"]] * 2


def curves(job, run):
    _, ranks = job
    assert all(rank["runs"][run] == ranks[0]["runs"][run] for rank in ranks)
    return ranks[0]["runs"][run]


@pytest.mark.parametrize("run", ["mlpmatch", "supervised", "teacher", "transformer"])
def test_processes_together_have_the_losses_and_weights_of_one(job, run):
    """With BatchNorm frozen, as its statistics are of another batch, and no padding; with the weights of a teacher."""
    several, one = curves(job, run), ddp_job.train(run, devices=1)
    assert len(one["losses"]) == ddp_job.STEPS
    assert several["losses"] == pytest.approx(one["losses"], rel=1e-12)
    assert several["weights"] == pytest.approx(one["weights"], rel=1e-12)


@pytest.mark.parametrize("run", ["mlpmatch, padded", "supervised, padded"])
def test_each_process_averages_over_its_own_valid_pixels(job, run):
    """As documented: the mean of the processes' losses, not the mean over the pixels of all of them."""
    several, shares = curves(job, run), ddp_job.train(run, devices=1, shares=len(job[1]))
    assert several["losses"] == pytest.approx(shares["losses"], rel=1e-12)
    assert several["weights"] == pytest.approx(shares["weights"], rel=1e-12)
    over_all_pixels = ddp_job.train(run, devices=1)["losses"]
    assert several["losses"] != pytest.approx(over_all_pixels, rel=1e-4)
    assert several["losses"] == pytest.approx(over_all_pixels, rel=0.1)


def test_metrics_are_those_of_one_process_for_any_number_of_images(job):
    _, ranks = job
    for count in (count for count in ddp_job.COUNTS if count >= len(ranks)):
        one = ddp_job.evaluate(count, devices=1)
        for rank in ranks:
            assert rank["evaluations"][str(count)] == one
        assert sum(map(sum, one["val"])) == sum(map(sum, one["test"])) == count * 48 * 48


def test_channel_dropout_differs_between_processes_and_steps(job):
    """Each process draws twice a step: for the low and the high features, from one generator."""
    _, ranks = job
    seeds = {seed for rank in ranks for seed in rank["validated"]["seeds"]}
    steps = len(ranks[0]["validated"]["seeds"]) // 2
    assert len(seeds) == len(ranks) * steps == len(ranks) * ddp_job.STEPS


def test_processes_validate_what_the_checkpoint_holds(job):
    folder, ranks = job
    assert all(rank["validated"]["buffers"] == ranks[0]["validated"]["buffers"] for rank in ranks)
    module = MLPMatch.load_from_checkpoint(folder / "last.ckpt", weights_only=True)
    ddp_job.trainer_of(1).validate(module, datamodule=ddp_job.datamodule_of(1, count=7), verbose=False)
    assert module.last_counts_CC.tolist() == ranks[0]["validated"]["counts"]
