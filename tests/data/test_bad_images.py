"""Files that break while a real training reads them."""

import itertools
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import run_command
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from mlpmatch_pl import MLPMatch, SemiSupervisedDataModule
from mlpmatch_pl.data.bad_images import MOST_TRIES
from mlpmatch_pl.data.datasets.folder import folder
from mlpmatch_pl.data.datasets.shapes import shapes
from mlpmatch_pl.utils.errors import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*worker processes in total.*"),  # more than the cores of this machine
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*"),
]
EPOCHS = 2
TRAIN_ONLY = {"limit_val_batches": 0}


def other_size(path):
    Image.open(path).resize((70, 71), Image.Resampling.NEAREST).save(path)


def deeper(path):
    pixels = np.full((40, 64), 40_000, np.uint16)
    Image.fromarray(pixels).save(path.with_suffix(".png"))
    path.with_suffix(".png").rename(path)


def in_its_place(path):
    path.unlink()
    path.mkdir()


UNREADABLE = {
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "overwritten with noise": lambda path: path.write_bytes(np.random.default_rng(0).bytes(500)),
    "a folder in its place": in_its_place,
    "16 bits a channel": deeper,
}
CAMPAIGN = [
    *(("unlabeled image", name, change) for name, change in UNREADABLE.items()),
    *(("labeled image", name, change) for name, change in {**UNREADABLE, "another size": other_size}.items()),
    *(("labeled mask", name, change) for name, change in {**UNREADABLE, "another size": other_size}.items()),
    ("labeled mask", "values that are no class", lambda path: Image.new("L", (64, 40), 7).save(path)),
]
NAMES = [f"{what}, {name}" for what, name, _ in CAMPAIGN]


class Data:
    """Ten images, five with masks, three of them for training."""

    def __init__(self, root, classes):
        self.root, self.classes = root, classes
        data = self.open()
        pairs = {
            "labeled": data.train.pair(data.labeled_indices[0]),
            "unlabeled": data.train.pair(data.unlabeled[0]),
            "val": data.val.pair(0),
        }
        self.paths = {f"{part} image": root / pair.image for part, pair in pairs.items()}
        self.paths |= {f"{part} mask": root / pair.mask for part, pair in pairs.items() if pair.mask}
        self.names = {part: pair.image for part, pair in pairs.items()}

    def open(self):
        return folder(str(self.root), self.classes, val=2)

    def datamodule(self, policy="raise", num_workers=0, **options):
        options = {"crop_size": 33, "batch_size": 2, "seed": 1, **options}
        return SemiSupervisedDataModule(self.open(), num_workers=num_workers, on_bad_image=policy, **options)


@pytest.fixture
def data(make_folder, classes):
    return Data(make_folder(count=10, masked=5), classes)


class ChangeAfter(Callback):
    """Does something to the files after the second step."""

    def __init__(self, change):
        self.change = change

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            self.change()


class Seen(Callback):
    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        halves = [batch["labeled"]["index"].tolist(), batch["unlabeled"]["index"].tolist()]
        self.batches.append((*halves, int(batch["labeled"]["image"].sum()), int(batch["unlabeled"]["strong"].sum())))


def fit(datamodule, *callbacks, checkpoint=None, epochs=EPOCHS, **options):
    torch.manual_seed(0)
    module = MLPMatch(3, backbone="test_resnet", decoder_channels=8, lr=0.01)
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "log_every_n_steps": 1}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "enable_checkpointing": False}
    trainer = Trainer(**{**quiet, **options}, max_epochs=epochs, callbacks=list(callbacks))
    trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return trainer, {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize(("what", "name", "change"), CAMPAIGN, ids=NAMES)
def test_a_training_names_the_file_that_broke(data, what, name, change):
    path = data.paths[what]
    with pytest.raises(UserError) as caught:
        fit(data.datamodule(), ChangeAfter(lambda: change(path)), **TRAIN_ONLY)
    assert path.stem in str(caught.value)
    assert str(caught.value).endswith("set loader.on_bad_image=skip to train on without such files")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("what", "name", "change"), CAMPAIGN, ids=NAMES)
def test_a_training_goes_on_without_the_file_that_broke(data, what, name, change, caplog):
    datamodule = data.datamodule("skip")
    trainer, weights = fit(datamodule, ChangeAfter(lambda: change(data.paths[what])), **TRAIN_ONLY)
    assert trainer.global_step == EPOCHS * datamodule.steps_per_epoch()
    assert all(value.isfinite().all() for value in weights.values())
    skipped = data.names[what.split()[0]]
    assert set(datamodule.skipped.counts) == {skipped}
    assert len([record for record in caplog.records if "left out (" in record.message]) == 1
    assert datamodule.skipped.report() == {"draws": datamodule.skipped.counts.total(), "images": 1}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_vanished_folder_ends_the_training_with_a_sentence(data, num_workers):
    for policy, message in (
        ("raise", "No such file or directory"),
        ("skip", r"none \(cannot read the image .*\); see whether the folder of the data is still there"),
    ):
        moved = data.root.with_name("moved")
        vanish = ChangeAfter(lambda moved=moved: data.root.rename(moved))
        with pytest.raises(UserError, match=message):
            fit(data.datamodule(policy, num_workers), vanish, **TRAIN_ONLY)
        moved.rename(data.root)


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("what", ["val image", "val mask"])
def test_a_validation_image_is_never_skipped(data, what, policy):
    with pytest.raises(UserError, match=data.paths[what].stem):
        fit(data.datamodule(policy), ChangeAfter(data.paths[what].unlink))


def test_cached_images_outlive_their_files(data, tmp_path):
    datamodule = data.datamodule(cache=str(tmp_path / "cache"), num_workers=2)
    trainer, _ = fit(datamodule, ChangeAfter(lambda: shutil.rmtree(data.root)))
    assert trainer.global_step == EPOCHS * datamodule.steps_per_epoch()


def test_an_image_of_another_size_without_a_mask_is_as_good_as_before(data):
    datamodule = data.datamodule()
    trainer, _ = fit(datamodule, ChangeAfter(lambda: other_size(data.paths["unlabeled image"])))
    assert trainer.global_step == EPOCHS * datamodule.steps_per_epoch()


# Replacements ---------------------------------------------------------------------------------------------------------


def broken_after_the_check(data, **options):
    """A labeled and an unlabeled image break between the check at the start and the first step."""
    datamodule = data.datamodule("skip", **options)
    datamodule.prepare_data()
    for what in ("labeled image", "unlabeled image"):
        data.paths[what].write_bytes(b"")
    return datamodule


def test_every_draw_of_a_bad_image_is_replaced_and_counted(data):
    datamodule = broken_after_the_check(data)
    seen = Seen()
    fit(datamodule, seen, **TRAIN_ONLY)
    opened = data.open()
    bad = {opened.labeled_indices[0], opened.unlabeled[0]}
    used = [index for labeled, unlabeled, *_ in seen.batches for index in labeled + unlabeled]
    assert not bad & set(used)
    expected = 0  # the draws themselves, one by one
    for loader in data.datamodule().train_dataloader().iterables.values():
        for epoch in range(EPOCHS):
            loader.sampler.set_epoch(epoch)
            expected += sum(place == 0 for place, _ in loader.sampler)
    assert datamodule.skipped.counts.total() == expected > 5


def test_number_of_workers_changes_nothing_where_images_are_skipped(data):
    runs = []
    for num_workers in (0, 1, 3):
        seen, datamodule = Seen(), broken_after_the_check(data, num_workers=num_workers)
        _, weights = fit(datamodule, seen, **TRAIN_ONLY)
        runs.append((seen.batches, weights, datamodule.skipped.counts))
        for what in ("labeled image", "unlabeled image"):  # whole again, for the next check
            Image.new("RGB", (64, 40) if what == "labeled image" else (50, 50)).save(data.paths[what])
    for batches, weights, counts in runs[1:]:
        assert batches == runs[0][0]
        assert counts == runs[0][2]
        assert [name for name in weights if not torch.equal(weights[name], runs[0][1][name])] == []


def test_a_resumed_run_makes_the_same_replacements(data, tmp_path):
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    straight = Seen()
    _, weights = fit(broken_after_the_check(data), straight, saver, enable_checkpointing=True, **TRAIN_ONLY)
    rest, datamodule = Seen(), data.datamodule("skip")  # whose check meets the broken files
    _, resumed = fit(datamodule, rest, checkpoint=str(tmp_path / "step=3.ckpt"), **TRAIN_ONLY)
    assert rest.batches == straight.batches[3:]
    assert [name for name in weights if not torch.equal(weights[name], resumed[name])] == []


def test_replacements_are_spread_over_the_other_images(data):
    datamodule = broken_after_the_check(data)
    bad = datamodule.data.unlabeled[0]
    found = {datamodule._unlabeled[0, number]["index"] for number in range(100)}
    assert found == set(datamodule.data.unlabeled) - {bad}


def test_the_search_for_a_replacement_is_bounded():
    datamodule = SemiSupervisedDataModule(shapes(labeled=3, train=60, val=2), crop_size=33, on_bad_image="skip")
    tried = []
    datamodule._unlabeled.source.image = lambda index: tried.append(index) or (_ for _ in ()).throw(OSError("gone"))
    with pytest.raises(UserError, match=f"but {MOST_TRIES} of 57 drawn one after another are none"):
        datamodule._unlabeled[3, 0]
    assert len(tried) == len(set(tried)) == MOST_TRIES


def test_a_source_of_ones_own_need_not_name_the_image(data):
    datamodule = data.datamodule()
    datamodule._unlabeled.source.image = lambda index: (_ for _ in ()).throw(OSError("stale file handle"))
    with pytest.raises(UserError, match=r"^cannot read images/.* \(stale file handle\); replace or remove it, or set"):
        datamodule._unlabeled[0, 0]


def test_the_check_at_the_start_names_what_will_be_skipped_but_no_evaluation_image(data, caplog):
    data.paths["unlabeled image"].write_bytes(b"")
    with pytest.raises(UserError, match=data.paths["unlabeled image"].name):
        data.datamodule().prepare_data()
    with caplog.at_level("WARNING"):
        data.datamodule("skip").prepare_data()
    notes = [record.message for record in caplog.records if "it will be left out" in record.message]
    assert len(notes) == 1
    assert data.paths["unlabeled image"].name in notes[0]
    data.paths["val image"].write_bytes(b"")
    with pytest.raises(UserError, match=data.paths["val image"].name):
        data.datamodule("skip").prepare_data()


def test_another_policy_is_refused(data):
    with pytest.raises(UserError, match=r"loader.on_bad_image as raise or skip, but got 'skipping'\. Did you mean"):
        data.datamodule("skipping")


# The command ----------------------------------------------------------------------------------------------------------

BREAKER = """
from pathlib import Path
from lightning.pytorch import Callback

class Break(Callback):
    def __init__(self, path):
        self.path = Path(path)

    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_step == 2:
            self.path.write_bytes(b"")
"""


def command(data, tmp_path, *overrides):
    (tmp_path / "breaker.py").write_text(BREAKER)
    path = data.paths["unlabeled image"]
    return run_command(
        "dataset=folder",
        f"dataset.root={data.root}",
        f"dataset.classes=[{','.join(data.classes)}]",
        "dataset.val=2",
        f"+callbacks.break={{_target_: breaker.Break, path: '{path}'}}",
        "callbacks.predictions=null",
        "backbone.decoder_channels=8",
        *("loader.crop_size=33", "loader.batch_size=2", "loader.eval_batch_size=1", "loader.num_workers=2"),
        "schedule.steps=15",
        "hydra.run.dir=run",
        *overrides,
        cwd=tmp_path,
    )


@pytest.mark.slow
def test_the_command_ends_with_one_line_out_of_a_worker(data, tmp_path):
    result = command(data, tmp_path)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines() == [
        f"error: cannot read the image {data.paths['unlabeled image']}: it is broken or no image; replace or remove "
        "it, or set loader.on_bad_image=skip to train on without such files"
    ]


@pytest.mark.slow
def test_the_command_tells_what_it_skipped(data, tmp_path):
    result = command(data, tmp_path, "loader.on_bad_image=skip")
    assert result.returncode == 0, result.stderr
    skipped = json.loads((tmp_path / "run" / "metrics.json").read_text())["skipped"]
    assert skipped["images"] == 1
    name = data.names["unlabeled"]
    lines = [line for line in result.stdout.splitlines() if name in line]
    assert len(lines) == 2
    assert lines[0].startswith("left out (loader.on_bad_image=skip): cannot read")
    assert lines[1] == f"{skipped['draws']} draws fell on bad images and were replaced: {name} ({skipped['draws']})"
    assert list(itertools.filterfalse((tmp_path / "run" / "train.log").read_text().__contains__, lines)) == []


SCRIPT = """
import sys
from torch import distributed
from mlpmatch_pl.data.bad_images import SkippedImages

rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
skipped = SkippedImages()
skipped.take({"skipped": [("both.png", "broken"), ("both.png", "broken")][: 2 - rank] + [(f"{rank}.png", "broken")]})
print(skipped.report())
"""


@pytest.mark.slow
def test_all_processes_are_counted(tmp_path):
    meeting = str(tmp_path / "meeting")
    processes = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(rank), meeting], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=200)[0].strip() for process in processes]
    assert outputs == [str({"draws": 5, "images": 3})] * 2
