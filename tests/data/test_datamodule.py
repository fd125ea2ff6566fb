import copy
import hashlib
import itertools
import multiprocessing
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from mlpmatch_pl import MLPMatch
from mlpmatch_pl.data.cache import fill_cache, with_cache
from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.data.datasets.folder import folder
from mlpmatch_pl.data.datasets.shapes import shapes
from mlpmatch_pl.data.files import FileSource
from mlpmatch_pl.methods.method import PRESETS
from mlpmatch_pl.utils.errors import UserError

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*"),
    pytest.mark.filterwarnings("ignore:.*worker processes in total.*"),  # more than the cores of this machine
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
]


def datamodule(labeled=3, train=12, val=2, test=1, **options):
    data = shapes(labeled=labeled, train=train, val=val, test=test, size=48)
    return SemiSupervisedDataModule(data, **{"crop_size": 33, "batch_size": 2, "num_workers": 0, **options})


def module(num_classes=6, **options):
    torch.manual_seed(0)
    return MLPMatch(num_classes, **{"backbone": "test_resnet", "decoder": {"channels": 8}, "lr": 0.01, **options})


def batches(loader):
    return [batch for batch, _, _ in loader]


class Recorder(Callback):
    """Which images came, and a hash of everything that came."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        tensors = [*batch["labeled"].values(), *(v for v in batch["unlabeled"].values() if torch.is_tensor(v))]
        content = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()[:12]
        self.seen.append((batch["unlabeled"]["index"].tolist(), content))


def test_batches_have_the_shapes_and_types_of_the_contract():
    batch = batches(datamodule(unlabeled_batch_size=3).train_dataloader())[0]
    labeled, unlabeled = batch["labeled"], batch["unlabeled"]
    assert {key: (tuple(value.shape), value.dtype) for key, value in labeled.items()} == {
        "image": ((2, 3, 33, 33), torch.uint8),
        "mask": ((2, 33, 33), torch.uint8),
        "index": ((2,), torch.int64),
    }
    assert {key: (tuple(value.shape), value.dtype) for key, value in unlabeled.items()} == {
        "weak": ((3, 3, 33, 33), torch.uint8),
        "strong": ((3, 2, 3, 33, 33), torch.uint8),
        "valid": ((3, 33, 33), torch.bool),
        "boxes": ((3, 2, 4), torch.int64),
        "index": ((3,), torch.int64),
    }


def test_same_image_partner_brings_a_second_view():
    batch = batches(datamodule(method="mlpmatch_official").train_dataloader())[0]["unlabeled"]
    assert {key: tuple(value.shape) for key, value in batch["partner"].items()} == {
        "weak": (2, 3, 33, 33),
        "strong": (2, 2, 3, 33, 33),
        "valid": (2, 33, 33),
    }
    assert not torch.equal(batch["partner"]["weak"], batch["weak"])


@pytest.mark.parametrize(("method", "views"), [("fixmatch", 1), ({"name": "unimatch", "strong_weights": [1, 1, 1]}, 3)])
def test_the_method_says_how_many_strong_views_there_are(method, views):
    unlabeled = batches(datamodule(method=method).train_dataloader())[0]["unlabeled"]
    assert unlabeled["strong"].shape[1] == unlabeled["boxes"].shape[1] == views


def test_the_method_says_which_boxes_are_drawn():
    for p, drawn in ((0.0, False), (1.0, True)):
        method = {"name": "mlpmatch", "cutmix": {"p": p}}
        boxes_BV4 = batches(datamodule(method=method).train_dataloader())[0]["unlabeled"]["boxes"]
        assert (boxes_BV4.any(dim=2) == drawn).all()


def test_a_method_comes_by_name_as_a_mapping_or_as_the_modules_own():
    for method in ("mlpmatch_official", {"name": "mlpmatch_official"}, module(method="mlpmatch_official").method):
        assert datamodule(method=method).method == PRESETS["mlpmatch_official"]
    with pytest.raises(UserError, match=r"but got .fixmatsch.. Did you mean fixmatch"):
        datamodule(method="fixmatsch")


def test_what_it_holds_is_printed():
    built = datamodule(method="fixmatch", unlabeled_batch_size=4)
    text = (
        "SemiSupervisedDataModule(method='fixmatch', crop_size=33, batch_size=2, unlabeled_batch_size=4; "
        "3 labeled, 9 unlabeled, 2 validation and 1 test images)"
    )
    assert str(built) == repr(built) == text


def test_one_labeled_and_two_unlabeled_images_are_enough():
    loaded = batches(datamodule(labeled=1, train=3).train_dataloader())
    assert len(loaded) == 1
    assert sorted(loaded[0]["unlabeled"]["index"].tolist()) == sorted(shapes(1, 3, 1, 1, 48).unlabeled)
    assert loaded[0]["labeled"]["image"].shape[0] == 2


@pytest.mark.parametrize(("labeled", "train", "steps"), [(3, 12, 5), (2, 12, 5), (9, 12, 5), (10, 12, 5), (4, 8, 2)])
def test_epoch_is_as_long_as_the_longer_stream(labeled, train, steps):
    built = datamodule(labeled=labeled, train=train)
    assert built.steps_per_epoch() == steps
    assert len(batches(built.train_dataloader())) == steps


def test_every_labeled_image_is_used_in_each_epoch_where_they_are_the_majority():
    built = datamodule(labeled=9, train=12)
    sampler = built.train_dataloader().iterables["labeled"].sampler
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert {index for index, _ in sampler} == set(range(9))


def test_every_unlabeled_image_is_used_in_each_epoch():
    loaded = batches(datamodule(labeled=3, train=13).train_dataloader())
    assert sorted(itertools.chain(*(batch["unlabeled"]["index"].tolist() for batch in loaded))) == sorted(
        shapes(3, 13, 1, 1, 48).unlabeled
    )


def test_supervised_batches_hold_as_many_images_and_an_epoch_as_many_steps():
    pair, alone = datamodule(unlabeled_batch_size=4), datamodule(unlabeled_batch_size=4, method="supervised")
    pairs, labeled = batches(pair.train_dataloader()), batches(alone.train_dataloader())
    assert [set(batch) for batch in labeled] == [{"labeled"}] * len(pairs)
    assert {len(batch["labeled"]["image"]) for batch in labeled} == {6} == {alone.images_per_step}


def test_supervised_needs_no_unlabeled_images():
    loaded = batches(datamodule(labeled=4, train=4, method="supervised").train_dataloader())
    assert [len(batch["labeled"]["mask"]) for batch in loaded] == [4, 4]


def test_methods_with_unlabeled_images_say_so_where_there_are_none():
    with pytest.raises(UserError) as caught:
        datamodule(labeled=4, train=4)
    assert str(caught.value) == (
        "expected unlabeled images beside the 4 labeled ones, but there are none; "
        "label fewer (dataset.labeled), add images without mask, or use method=supervised"
    )


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"unlabeled_batch_size": 0}, {"eval_batch_size": 0}, {"num_workers": -1}]
)
def test_sizes_below_one_are_refused(options):
    with pytest.raises(UserError, match="expected batch sizes of at least 1 and workers of at least 0, but got"):
        datamodule(**options)


@pytest.mark.parametrize(
    ("total", "shares"), [(0, (0, 0)), (1, (0, 1)), (2, (1, 1)), (4, (1, 3)), (8, (2, 6)), (9, (2, 7))]
)
def test_workers_are_shared_out_in_all(total, shares):
    loaders = datamodule(num_workers=total).train_dataloader().iterables
    assert (loaders["labeled"].num_workers, loaders["unlabeled"].num_workers) == shares
    assert datamodule(num_workers=total).val_dataloader().num_workers == total


def test_evaluation_images_come_once_in_order_at_their_own_size(folder_root, classes):
    built = SemiSupervisedDataModule(folder(str(folder_root), classes, val=2), crop_size=33, num_workers=0)
    samples = list(built.val_dataloader())
    assert [sample["index"].item() for sample in samples] == [0, 1]
    assert [tuple(sample["image"].shape[2:]) for sample in samples] == [
        built.data.val.mask(index).shape for index in range(2)
    ]
    assert {sample["image"].dtype for sample in samples} | {sample["mask"].dtype for sample in samples} == {torch.uint8}


def test_test_images_are_the_validation_images_where_there_are_no_others(folder_root, classes):
    built = SemiSupervisedDataModule(folder(str(folder_root), classes, val=2), crop_size=33, num_workers=0)
    assert built.data.test is None
    assert len(list(built.test_dataloader())) == 2
    assert len(list(datamodule(val=2, test=3).test_dataloader())) == 3


def test_same_seed_gives_the_same_batches_and_another_seed_others():
    first, again, other = (batches(datamodule(seed=seed).train_dataloader()) for seed in (1, 1, 2))
    for part, key in (("labeled", "image"), ("labeled", "mask"), ("unlabeled", "strong"), ("unlabeled", "index")):
        assert all(torch.equal(a[part][key], b[part][key]) for a, b in zip(first, again, strict=True))
        assert not all(torch.equal(a[part][key], b[part][key]) for a, b in zip(first, other, strict=True))


def test_prepare_data_reads_every_file_once(folder_root, classes, monkeypatch):
    data = folder(str(folder_root), classes, val=2)
    calls = []
    monkeypatch.setattr(
        "mlpmatch_pl.data.datamodule.validate_dataset", lambda *arguments: calls.append(arguments) or set()
    )
    built = SemiSupervisedDataModule(data, crop_size=33, num_workers=0)
    built.prepare_data()
    built.prepare_data()
    assert calls == [(data, 33, False)]


@pytest.mark.parametrize("method", ["mlpmatch_official", "unimatch", "supervised"])
def test_plain_trainer_fits_every_method(method, folder_root, classes):
    built = module(len(classes), method=method)
    data = SemiSupervisedDataModule(
        folder(str(folder_root), classes, labeled=2, val=1),
        crop_size=48,
        batch_size=2,
        method=method,
        num_workers=0,
    )
    before = [parameter.detach().clone() for parameter in built.parameters()]
    trainer = Trainer(**QUIET, max_epochs=1, limit_train_batches=3, enable_checkpointing=False)
    trainer.fit(built, datamodule=data)
    assert trainer.global_step == data.steps_per_epoch() == 3
    assert 0 <= trainer.callback_metrics["val/miou"] <= 1
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert any(not torch.equal(a, b) for a, b in zip(before, built.parameters(), strict=True))


def test_trainer_hands_the_module_uint8_batches_and_new_ones_in_every_epoch():
    recorder, types = Recorder(), set()

    class Types(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            types.update({batch["labeled"]["image"].dtype, batch["labeled"]["mask"].dtype})
            types.update({batch["unlabeled"]["weak"].dtype, batch["unlabeled"]["strong"].dtype})

    trainer = Trainer(**QUIET, max_epochs=3, callbacks=[recorder, Types()], enable_checkpointing=False)
    trainer.fit(module(), datamodule=datamodule())
    assert types == {torch.uint8}
    epochs = [recorder.seen[start : start + 5] for start in (0, 5, 10)]
    assert len(recorder.seen) == 15
    assert len({content for _, content in recorder.seen}) == 15
    for epoch in epochs:
        assert {index for indices, _ in epoch for index in indices} == set(shapes(3, 12, 1, 1, 48).unlabeled)
    orders = [[indices for indices, _ in epoch] for epoch in epochs]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_lightning_keeps_the_samplers_of_the_data_module():
    built = datamodule()
    trainer = Trainer(**QUIET, max_epochs=1, enable_checkpointing=False)
    trainer.fit(module(), datamodule=built)
    samplers = [loader.sampler for loader in trainer.train_dataloader.values()]
    assert [type(sampler).__name__ for sampler in samplers] == ["StreamSampler", "StreamSampler"]
    assert type(trainer.val_dataloaders.sampler).__name__ == "ShardSampler"


def test_validate_fit_test_and_fit_again_in_one_process():
    built, data = module(), datamodule()
    for _ in range(2):
        trainer = Trainer(**QUIET, max_epochs=1, enable_checkpointing=False)
        trainer.validate(built, datamodule=data, verbose=False)
        trainer.fit(built, datamodule=data)
        assert trainer.global_step == 5
        assert "test/miou" in trainer.test(built, datamodule=data, verbose=False)[0]


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_devices_and_accumulated_batches_share_a_step(devices, accumulated):
    built = datamodule(batch_size=16, unlabeled_batch_size=32, batch_per="step")
    for _ in range(2):  # by the command, and by a Trainer's setup
        built.share_batches(devices, accumulated)
    shares = devices * accumulated
    assert (built.batch_size * shares, built.unlabeled_batch_size * shares) == (16, 32)
    each = datamodule(batch_size=16)
    each.share_batches(devices, accumulated)
    assert each.batch_size == 16


def test_a_step_that_cannot_be_shared_is_refused():
    with pytest.raises(UserError, match=r"expected 3 devices and 1 accumulated batches to share 8 labeled and 8"):
        datamodule(batch_size=8, batch_per="step").share_batches(3, 1)
    with pytest.raises(UserError, match=r"loader.batch_per as device or step, but got 'steps'. Did you mean step"):
        datamodule(batch_per="steps")


def test_a_plain_trainer_shares_a_step_too():
    trainer = Trainer(**QUIET, max_epochs=1, accumulate_grad_batches=2, enable_checkpointing=False)
    recorder = Batches()
    trainer.callbacks.append(recorder)
    trainer.fit(module(), datamodule=datamodule(batch_size=4, batch_per="step"))
    assert {len(batch["labeled"]["image"]) for batch in recorder.batches} == {2}


# Burn-in --------------------------------------------------------------------------------------------------------------

BURN_IN = {"name": "fixmatch", "burn_in": 0.5, "teacher": {"decay": 0.9, "ramp": True}, "pseudo_labels": "teacher"}


class Batches(Callback):
    """Copies of all batches of a training."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(copy.deepcopy(batch))


def train_on(method, epochs=2, callbacks=(), **options):
    """Train, and return the batches and the module."""
    recorder, built = Batches(), module(method=method)
    trainer = Trainer(**QUIET, max_epochs=epochs, callbacks=[recorder, *callbacks], enable_checkpointing=False)
    trainer.fit(built, datamodule=datamodule(method=method, **options))
    return recorder.batches, built


@pytest.mark.parametrize("workers", [0, 2])
def test_burn_in_trains_on_the_batches_of_supervised_training_and_then_on_pairs(workers):
    own, _ = train_on(BURN_IN, num_workers=workers)
    supervised, _ = train_on("supervised")
    assert len(own) == len(supervised) == 10
    for batch, expected in zip(own[:5], supervised[:5], strict=True):
        assert batch["unlabeled"] == {}
        assert all(torch.equal(value, expected["labeled"][key]) for key, value in batch["labeled"].items())
    assert [(len(batch["labeled"]["image"]), len(batch["unlabeled"]["weak"])) for batch in own[5:]] == [(2, 2)] * 5


def test_after_burn_in_the_labeled_batch_may_stay_that_of_supervised_training():
    own, _ = train_on({**BURN_IN, "full_labeled_batch": True})
    supervised, _ = train_on("supervised")
    for batch, expected in zip(own, supervised, strict=True):
        assert all(torch.equal(value, expected["labeled"][key]) for key, value in batch["labeled"].items())
    assert [len(batch["unlabeled"]["weak"]) for batch in own[5:]] == [2] * 5


class Weights(Callback):
    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append([weight.detach().clone() for weight in pl_module.segmentor.parameters()])


def test_burn_in_equals_supervised_training_step_for_step():
    own, supervised = Weights(), Weights()
    train_on(BURN_IN, callbacks=[own])
    train_on("supervised", callbacks=[supervised])
    same = [
        all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        for first, second in zip(own.steps, supervised.steps, strict=True)
    ]
    assert same == [True] * 5 + [False] * 5


@pytest.mark.parametrize("stop", [2, 5, 7])  # inside the burn-in, at its end, after it
def test_a_run_resumed_inside_or_after_burn_in_ends_like_the_straight_run(tmp_path, stop):
    every = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False)
    straight, resumed = module(method=BURN_IN), module(method=BURN_IN)
    Trainer(**QUIET, max_epochs=2, callbacks=[every]).fit(straight, datamodule=datamodule(method=BURN_IN))
    recorder = Batches()
    trainer = Trainer(**QUIET, max_epochs=2, callbacks=[recorder], enable_checkpointing=False)
    path = tmp_path / f"step={stop}.ckpt"
    trainer.fit(resumed, datamodule=datamodule(method=BURN_IN), ckpt_path=str(path), weights_only=True)
    assert [bool(batch["unlabeled"]) for batch in recorder.batches] == [step >= 5 for step in range(stop, 10)]
    expected = straight.state_dict()
    assert any(name.startswith("teacher.") for name in expected)
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())


def test_without_a_trainer_there_is_no_burn_in():
    assert len(batches(datamodule(method=BURN_IN).train_dataloader())[0]["unlabeled"]["weak"]) == 2


def test_burn_in_needs_a_length():
    trainer = Trainer(**QUIET, max_epochs=-1, enable_checkpointing=False)
    with pytest.raises(UserError, match=r"known length of training for method.burn_in=0.5"):
        trainer.fit(module(method={**BURN_IN}, power=0), datamodule=datamodule(method=BURN_IN))


# Resume ---------------------------------------------------------------------------------------------------------------

EPOCHS, STEPS = 3, 5  # nine unlabeled images in batches of two


def test_a_checkpoint_without_a_training_has_no_place_in_the_data(tmp_path):
    built, quiet = datamodule(), {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = Trainer(**quiet, enable_checkpointing=False, enable_model_summary=False)
    trainer.validate(module(), datamodule=built, verbose=False)
    trainer.save_checkpoint(tmp_path / "validated.ckpt")
    assert "SemiSupervisedDataModule" not in torch.load(tmp_path / "validated.ckpt", weights_only=True)
    built.load_state_dict(built.state_dict())
    assert len(batches(built.train_dataloader())) == built.steps_per_epoch()  # from the beginning


def checkpoints(folder):
    """One after every step, one after every epoch, one after every validation, as a user may have chosen."""
    shared = {"dirpath": folder, "save_top_k": -1, "enable_version_counter": False}
    return [
        ModelCheckpoint(**shared, filename="{step}", every_n_train_steps=1),
        ModelCheckpoint(**shared, filename="end-{epoch}", every_n_epochs=1, save_on_train_epoch_end=True),
        ModelCheckpoint(**shared, filename="val-{epoch}", monitor="val/miou", save_on_train_epoch_end=False),
    ]


def fit(num_workers, callbacks, checkpoint=None, **options):
    recorder, built = Recorder(), module()
    trainer = Trainer(**QUIET, max_epochs=EPOCHS, callbacks=[recorder, *callbacks], **options)
    data = datamodule(num_workers=num_workers)
    trainer.fit(built, datamodule=data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    assert trainer.global_step == EPOCHS * STEPS
    return recorder.seen, {name: value.clone() for name, value in built.state_dict().items()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run without a break: what it saw, its weights, and its checkpoints; for both kinds of loading."""
    runs = {}
    for num_workers in (0, 2):
        place = tmp_path_factory.mktemp(f"workers{num_workers}")
        runs[num_workers] = (place, *fit(num_workers, checkpoints(place)))
    return runs


def test_number_of_workers_changes_nothing(straight):
    (_, seen, weights), (_, seen_by_workers, weights_by_workers) = straight[0], straight[2]
    assert seen == seen_by_workers
    assert all(torch.equal(weights[name], weights_by_workers[name]) for name in weights)


@pytest.mark.parametrize(
    ("name", "done", "num_workers"),
    [
        ("step=3", 3, 0),
        ("step=5", 5, 0),  # after an epoch's last batch
        ("step=8", 8, 2),
        ("end-epoch=0", 5, 0),
        ("val-epoch=1", 10, 2),
    ],
)
def test_resumed_run_sees_what_the_straight_run_saw_and_ends_with_its_weights(straight, name, done, num_workers):
    place, seen, weights = straight[num_workers]
    rest, resumed = fit(num_workers, [], str(place / f"{name}.ckpt"), enable_checkpointing=False)
    assert rest == seen[done:]
    assert [key for key in weights if not torch.equal(weights[key], resumed[key])] == []


def test_a_run_resumed_twice_ends_like_the_straight_run(straight, tmp_path):
    place, seen, weights = straight[0]
    fit(0, checkpoints(tmp_path), str(place / "step=3.ckpt"))
    rest, resumed = fit(0, [], str(tmp_path / "step=7.ckpt"), enable_checkpointing=False)
    assert rest == seen[7:]
    assert [key for key in weights if not torch.equal(weights[key], resumed[key])] == []


def test_checkpoints_after_an_epoch_and_in_it_hold_where_to_go_on(straight):
    place = straight[0][0]
    states = {name: torch.load(place / f"{name}.ckpt", weights_only=True) for name in ("step=3", "step=5", "step=8")}
    places = {name: state["SemiSupervisedDataModule"] for name, state in states.items()}
    assert places["step=3"] == {"epoch": 0, "batch": 3, "batches": STEPS}
    assert places["step=5"] == {"epoch": 0, "batch": STEPS, "batches": STEPS}
    assert places["step=8"] == {"epoch": 1, "batch": 3, "batches": STEPS}


# The cache ----------------------------------------------------------------------------------------------------


def with_folder(root, classes, cache, **options):
    data = folder(str(root), classes, labeled=2, val=2, split_seed=options.pop("split_seed", 0))
    built = SemiSupervisedDataModule(data, crop_size=33, batch_size=2, num_workers=0, cache=cache, **options)
    built.prepare_data()
    built.setup("fit")
    return built


def content(datamodule):
    tensors = [t for b in batches(datamodule.train_dataloader()) for half in b.values() for t in flat(half)]
    tensors += [t for batch in datamodule.val_dataloader() for t in flat(batch)]
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def flat(batch):
    return [value for value in batch.values() if torch.is_tensor(value)]


def test_batches_from_the_cache_are_the_same(folder_root, classes, tmp_path):
    plain = content(with_folder(folder_root, classes, None))
    assert content(with_folder(folder_root, classes, str(tmp_path / "cache"))) == plain
    assert content(with_folder(folder_root, classes, str(tmp_path / "cache"))) == plain


def test_files_are_decoded_once_and_again_when_they_change(folder_root, classes, tmp_path, monkeypatch):
    first = with_folder(folder_root, classes, str(tmp_path / "cache"))
    read, original = [], FileSource.image
    monkeypatch.setattr(FileSource, "image", lambda self, i: read.append(self.name(i)) or original(self, i))
    monkeypatch.setattr("mlpmatch_pl.data.datamodule.validate_dataset", lambda *arguments: set())
    content(with_folder(folder_root, classes, str(tmp_path / "cache")))
    assert read == []
    changed = folder_root / first.data.train.name(first.data.unlabeled[0])
    pixels = np.asarray(Image.open(changed))
    Image.fromarray(255 - pixels).save(changed)
    before = content(with_folder(folder_root, classes, None))
    read.clear()
    assert content(with_folder(folder_root, classes, str(tmp_path / "cache"))) == before
    assert len(read) > 0


def test_another_choice_of_labels_decodes_no_image_again(folder_root, classes, tmp_path):
    val = tmp_path / "val.txt"
    val.write_text("images/img0.jpg masks/img0.png")
    for seed in range(4):
        data = folder(str(folder_root), classes, labeled=1, val=str(val), split_seed=seed)
        fill_cache(data, tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*_image.npy"))) == 8
    assert 2 < len(list((tmp_path / "cache").glob("*_mask.npy"))) <= 5


def test_a_source_without_files_has_no_cache(tmp_path):
    with pytest.raises(UserError, match=r"expected files for loader.cache, but Shapes cannot tell"):
        datamodule(cache=str(tmp_path)).prepare_data()


def test_data_sets_of_equal_names_sizes_and_times_share_a_cache_folder_without_mixing(tmp_path, classes):
    found = []
    for name, value in (("first", 10), ("second", 200)):
        root = tmp_path / name
        for folder_name, count in (("images", 5), ("masks", 3)):
            (root / folder_name).mkdir(parents=True)
            for number in range(count):
                shape = (40, 40, 3) if folder_name == "images" else (40, 40)
                pixels = np.full(shape, value if folder_name == "images" else number % 3, np.uint8)
                path = root / folder_name / f"{number}.bmp"
                Image.fromarray(pixels).save(path)
                os.utime(path, (0, 0))
        data = folder(str(root), classes, labeled=1, val=1)
        fill_cache(data, tmp_path / "cache")
        found.append(with_cache(data, tmp_path / "cache").train.image(0)[0, 0, 0])
    assert found == [10, 200]


@pytest.mark.parametrize(("loader", "val", "test", "name"), [("val", 2, 3, "validation"), ("test", 3, 2, "test")])
def test_a_process_without_an_image_to_evaluate_is_refused_rather_than_waited_for(loader, val, test, name):
    data = SemiSupervisedDataModule(shapes(labeled=4, train=16, val=val, test=test, size=48), crop_size=48)
    data.trainer = SimpleNamespace(global_rank=0, world_size=3, num_devices=3, strategy=Trainer(**QUIET).strategy)
    other = {"val": data.test_dataloader, "test": data.val_dataloader}[loader]
    assert len(other()) == 1
    with pytest.raises(UserError, match=f"expected at least 3 {name} images, one per process, but got 2"):
        getattr(data, f"{loader}_dataloader")()


def test_a_dataset_is_plain_data_with_its_name():
    plain = {"name": "shapes", "labeled": 3, "train": 12, "val": 2, "size": 48}
    module = SemiSupervisedDataModule(plain, crop_size=33, num_workers=0)
    assert (module.data.labeled, len(module.data.unlabeled)) == (datamodule().data.labeled, 9)
    for wrong, message in (
        ({"name": "shape"}, "Did you mean shapes"),
        ({"name": "shapes", "train_": 9}, "data.train_"),
    ):
        with pytest.raises(UserError, match=message):
            SemiSupervisedDataModule(wrong)


def test_the_tuner_scales_both_halves_of_a_batch(tmp_path):
    from lightning.pytorch.tuner import Tuner

    data = datamodule(labeled=8, train=24, unlabeled_batch_size=4)
    trainer = Trainer(**QUIET, max_epochs=1, default_root_dir=tmp_path)
    Tuner(trainer).scale_batch_size(module(), datamodule=data, init_val=2, max_trials=2, steps_per_trial=1)
    assert (data.batch_size, data.unlabeled_batch_size) == (4, 8)


def test_workers_start_in_a_process_of_joblib():
    """Its start method loky cannot start loading workers, nor can it be the default of a spawned one."""
    import joblib.externals.loky  # noqa: F401  # registers the start method

    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("loky", force=True)
    try:
        batch = next(iter(datamodule(num_workers=1).val_dataloader()))
        assert multiprocessing.get_start_method() in multiprocessing.get_all_start_methods()
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert batch["image"].shape[1] == 3
