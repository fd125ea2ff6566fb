"""A loss that is not finite: the message, and the saved step, which repeats without the dataset."""

import errno
import math
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, compose_train
from lightning.pytorch import Callback, Trainer

from mlpmatch_pl import MLPMatch, SemiSupervisedDataModule
from mlpmatch_pl.callbacks.finite_loss import FiniteLoss
from mlpmatch_pl.data.datasets.shapes import shapes
from mlpmatch_pl.methods.method import total_loss
from mlpmatch_pl.train import train
from mlpmatch_pl.utils.errors import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]


class Spoil(Callback):
    """Before a step, puts a value into the network, and remembers the weights at the last step's end."""

    def __init__(self, step, spoil):
        self.step, self.spoil = step, spoil

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.spoil(pl_module)
            self.batch = batch
            self.before = {name: value.clone() for name, value in pl_module.state_dict().items()}


def spoil_strong_views(value):
    """The labeled terms stay finite: the views of the strong pass alone are spoiled."""

    def spoil(module):
        original = module.step.strong_pass

        def strong_pass(*arguments):
            passed = original(*arguments)
            first, *others = passed.logits
            return replace(passed, logits=[first * value, *others])

        module.step.strong_pass = strong_pass

    return spoil


def build(method="mlpmatch", **options):
    torch.manual_seed(0)
    options = {"confidence_threshold": 0.0, **options}
    module = MLPMatch(6, method=method, backbone="test_resnet", decoder={"channels": 8}, lr=0.01, **options)
    data = shapes(labeled=3, train=12, val=2, test=1, size=48)
    datamodule = SemiSupervisedDataModule(data, method=method, crop_size=33, batch_size=2, num_workers=0)
    return module, datamodule


def trainer_with(*callbacks, **options):
    return Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_epochs=2, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), **options,
    )  # fmt: skip


def caught_by(folder, spoiler, module, datamodule, **options):
    with pytest.raises(UserError) as caught:
        trainer_with(spoiler, FiniteLoss(str(folder)), **options).fit(module, datamodule=datamodule)
    return str(caught.value)


def load_step(path):
    """Return a saved step and its module."""
    step = torch.load(path, weights_only=True)
    module = MLPMatch(**step["hyper_parameters"])
    module.load_state_dict(step["state_dict"])
    return step, module.train()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_message_names_the_step_its_terms_and_its_images(tmp_path, value):
    module, datamodule = build()
    spoiler = Spoil(3, spoil_strong_views(value))
    message = caught_by(tmp_path, spoiler, module, datamodule)
    assert message.startswith("expected a finite loss, but step 4 of epoch 1 gives s1 ")
    for half in ("labeled", "unlabeled"):
        names = [datamodule.data.train.name(index) for index in spoiler.batch[half]["index"].tolist()]
        assert len(names) == 2
        assert f"{half} {', '.join(names)}" in message
    assert message.endswith(f"the step is saved in {tmp_path}/step_4.pt")
    assert "\n" not in message


@pytest.mark.parametrize("method", ["mlpmatch", "mlpmatch_official", "supervised"])
def test_the_saved_step_repeats_without_the_dataset_to_the_last_bit(tmp_path, method):
    def claim(module):  # leaves the computation as it is: only the callback sees a bad loss
        original = module.training_step

        def training_step(batch, batch_idx):
            loss = original(batch, batch_idx)
            module.last_terms["loss"] = loss.detach() * math.nan
            return loss

        module.training_step = training_step

    spoiler = Spoil(3, claim)
    caught_by(tmp_path, spoiler, *build(method))
    step, module = load_step(tmp_path / "step_4.pt")
    before = {name: value for name, value in spoiler.before.items() if not name.endswith("num_batches_tracked")}
    assert [name for name, value in before.items() if not torch.equal(step["state_dict"][name], value)] == []
    result = module.step(step["batch"]["labeled"], step["batch"].get("unlabeled", {}), step["draw_step"])
    assert {name: term.item() for name, term in result.terms.items()} == {
        name: value for name, value in step["terms"].items() if name != "loss"
    }
    assert math.isfinite(total_loss(result.terms, module.method, step["lambda_np"]))


def test_each_of_several_accumulated_batches_is_checked(tmp_path):
    spoiler = Spoil(1, spoil_strong_views(math.nan))
    assert "step 2 of epoch 1" in caught_by(tmp_path, spoiler, *build(), accumulate_grad_batches=2)
    step, module = load_step(tmp_path / "step_2.pt")
    assert step["draw_step"] == 2
    result = module.step(step["batch"]["labeled"], step["batch"]["unlabeled"], 2)
    assert float(result.terms["x"]) == step["terms"]["x"]


def test_a_finite_training_saves_nothing_and_computes_the_same(tmp_path):
    modules = []
    for callbacks in ([FiniteLoss(str(tmp_path / "nonfinite"))], []):
        module, datamodule = build()
        trainer_with(*callbacks).fit(module, datamodule=datamodule)
        modules.append(module.state_dict())
    assert not (tmp_path / "nonfinite").exists()
    assert [name for name, value in modules[0].items() if not torch.equal(value, modules[1][name])] == []


@pytest.mark.parametrize("reason", ["Not a directory", "the disk is full"])
def test_a_step_that_cannot_be_saved_still_ends_with_the_message(tmp_path, reason, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "nonfinite" if reason == "Not a directory" else tmp_path / "nonfinite"
    if reason == "the disk is full":
        monkeypatch.setattr(os, "fsync", fail)
    message = caught_by(folder, Spoil(3, spoil_strong_views(math.nan)), *build())
    assert "the step could not be saved (" in message
    assert reason in message
    assert list(tmp_path.rglob("*.pt*")) == []


def test_every_run_has_the_guard(tmp_path):
    with pytest.raises(UserError, match=r"expected a finite loss, but step 2 of epoch 1 gives x nan, .*step_2\.pt"):
        train(compose_train(*TINY, "schedule.lr=1e30", output_dir=tmp_path))
    assert torch.load(tmp_path / "nonfinite" / "step_2.pt", weights_only=True)["draw_step"] == 1
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_process_stops_at_the_step_whose_loss_is_not_finite_in_another(tmp_path, monkeypatch):
    """Or it would wait for that process forever."""
    module, _ = build()
    module.last_terms = {"loss": torch.ones(())}
    trainer = SimpleNamespace(world_size=2, global_rank=0, global_step=6, current_epoch=1)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda flag, operation: flag.fill_(1))
    guard = FiniteLoss(str(tmp_path))
    guard.on_train_start(trainer, module)
    guard.on_train_batch_start(trainer, module, {}, 0)
    guard.on_before_backward(trainer, module, module.last_terms["loss"])
    with pytest.raises(UserError, match="that of another process is not finite in step 7 of epoch 2; see its message"):
        guard.on_after_backward(trainer, module)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_looking_at_the_loss_does_not_make_the_gpu_wait(tmp_path):
    module, _ = build()
    module.cuda()
    guard, trainer = FiniteLoss(str(tmp_path)), Trainer(accelerator="gpu", devices=1, logger=False)
    guard.on_train_start(trainer, module)
    torch.cuda.set_sync_debug_mode("error")
    try:
        guard.on_train_batch_start(trainer, module, {}, 0)
        module.last_terms = {"loss": torch.ones((), device="cuda")}
        guard.on_before_backward(trainer, module, module.last_terms["loss"])
        guard.on_after_backward(trainer, module)
    finally:
        torch.cuda.set_sync_debug_mode("default")
