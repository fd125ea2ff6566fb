import json
import subprocess
import sys

import pytest

LABELED, TRAIN, VAL = 5, 17, 5
BATCH, EPOCHS = 4, 3  # a global batch; an epoch has three steps

SCRIPT = """
import hashlib, json, sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer

from mlpmatch_pl import MLPMatch
from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.data.samples import LabeledViews, UnlabeledViews, WholeImages
from mlpmatch_pl.data.shapes import shapes
from mlpmatch_pl.perturbation import NetworkPerturbation

out, devices, distributed_sampler, labeled, train, val, batch, epochs = json.loads(sys.argv[1])
seen = {"LabeledViews": [], "UnlabeledViews": [], "WholeImages": [], "blocks": []}


def record(cls):
    read = cls.__getitem__
    def spy(self, key):
        seen[cls.__name__].append(key)
        return read(self, key)
    cls.__getitem__ = spy


for cls in (LabeledViews, UnlabeledViews, WholeImages):
    record(cls)
draw = NetworkPerturbation.draw


def spy_draw(self, stages, step):
    blocks = draw(self, stages, step)
    seen["blocks"].append([step, sorted(blocks)])
    return blocks


NetworkPerturbation.draw = spy_draw


def digest(tensors):
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = MLPMatch(6, backbone="test_resnet", decoder_channels=8, lr=0.01)
    data = shapes(labeled=labeled, train=train, val=val, test=1, size=48)
    datamodule = SemiSupervisedDataModule(data, crop_size=33, batch_size=batch // devices, num_workers=0)
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=epochs,
        use_distributed_sampler=distributed_sampler, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0, log_every_n_steps=1,
        inference_mode=False,
    )
    before = digest(module.parameters())
    metrics = trainer.validate(module, datamodule=datamodule, verbose=False)[0]
    validated = list(seen["WholeImages"])
    seen["WholeImages"].clear()
    trainer.fit(module, datamodule=datamodule)
    result = {
        **seen, "validated": validated, "metrics": metrics, "before": before, "after": digest(module.parameters()),
        "steps": trainer.global_step, "counts": module.last_counts_CC.tolist(),
        "samplers": [type(loader.sampler).__name__ for loader in trainer.train_dataloader.values()],
    }
    Path(out, f"rank{trainer.global_rank}.json").write_text(json.dumps(result))
"""


def launch(folder, devices, distributed_sampler):
    (folder / "script.py").write_text(SCRIPT)
    arguments = json.dumps([str(folder), devices, distributed_sampler, LABELED, TRAIN, VAL, BATCH, EPOCHS])
    done = subprocess.run(
        [sys.executable, "script.py", arguments], cwd=folder, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(devices)]


@pytest.fixture(
    scope="module", params=[True, pytest.param(False, marks=pytest.mark.slow)], ids=["default", "keep_samplers"]
)
def ranks(request, tmp_path_factory):
    return launch(tmp_path_factory.mktemp("two"), 2, request.param)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("one"), 1, True)[0]


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


@pytest.mark.parametrize("stream", ["LabeledViews", "UnlabeledViews"])
def test_ranks_share_every_global_batch_of_the_single_process(ranks, single, stream):
    share = BATCH // 2
    steps = [[rank[stream][start : start + share] for rank in ranks] for start in range(0, 3 * EPOCHS * share, share)]
    for step, (first, second) in enumerate(steps):
        assert not {draw for _, draw in first} & {draw for _, draw in second}
        assert sorted(first + second, key=lambda draw: draw[1]) == single[stream][step * BATCH : (step + 1) * BATCH]
    assert sum(len(rank[stream]) for rank in ranks) == len(single[stream]) == 3 * EPOCHS * BATCH


def test_every_labeled_image_reaches_both_ranks(ranks):
    for rank in ranks:
        assert {index for index, _ in rank["LabeledViews"]} == set(range(LABELED))


def test_ranks_together_use_every_unlabeled_image_once_an_epoch(ranks):
    for epoch in range(EPOCHS):
        draws = [rank["UnlabeledViews"][6 * epoch : 6 * (epoch + 1)] for rank in ranks]
        assert sorted(index for rank in draws for index, _ in rank) == list(range(TRAIN - LABELED))


def test_every_validation_image_is_counted_once(ranks, single):
    assert sorted(ranks[0]["validated"] + ranks[1]["validated"]) == list(range(VAL)) == single["validated"]
    assert len(ranks[0]["validated"]) != len(ranks[1]["validated"])  # five images, two ranks
    for epoch in range(EPOCHS):
        shares = [[0, 2, 4], [1, 3]]
        assert [
            rank["WholeImages"][epoch * len(share) : (epoch + 1) * len(share)]
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
