"""The LightningModule with random tensors, trained by a Trainer, by Fabric and by a plain loop."""

import copy
import io
import pickle
import re

import pytest
import torch
from helpers.batches import make_batch
from helpers.processes import FORKS
from lightning.fabric import Fabric
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, IterableDataset

from mlpmatch_pl import MLPMatch, SemiSupervisedDataModule, UserError, shapes
from mlpmatch_pl.methods.method import PRESETS

CLASSES, BATCHES = 3, 3
CLASSIFIER = "segmentor.decoder.classifier.weight"
TRAIN_KEYS = {"loss", "loss_x", "loss_x_np", "loss_s", "loss_fp", "loss_u_np", "confident_ratio", "lambda_np", "lr"}


def make_module(classes=CLASSES, **options):
    torch.manual_seed(0)
    return MLPMatch(classes, **{"backbone": "test_resnet", "decoder": {"channels": 8}, **options})


def random_batch(index=0):
    return make_batch(2, 2, size=(33, 33), classes=CLASSES, seed=index)


def loader(batches=BATCHES):
    return DataLoader([random_batch(index) for index in range(batches)], batch_size=None)


def make_trainer(folder, callbacks=(), **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    machine = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "logger": False}
    limits = {"max_epochs": 1, "log_every_n_steps": 1, "num_sanity_val_steps": 0}
    return Trainer(**{**quiet, **machine, **limits, **options}, callbacks=list(callbacks))


class Recorder(Callback):
    """Records the step, the learning rates, lambda and the seed of the draws of every training batch."""

    def __init__(self):
        self.steps, self.rates, self.lambdas, self.draws = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.steps.append(trainer.global_step)
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])
        self.draws.append(pl_module.draw_step(batch_idx))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.lambdas.append(trainer.callback_metrics["train/lambda_np"].item())


OPTIONS = {
    "lr": 0.01,
    "lr_multi": 5.0,
    "class_names": ["sky", "road", "tree"],
    "criterion": {"name": "ce", "class_weights": [1.0, 2.0, 0.5]},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer, the trained module, a recorder, and a checkpoint, after two epochs of three steps."""
    folder, recorder, module = tmp_path_factory.mktemp("trained"), Recorder(), make_module(**OPTIONS)
    trainer = make_trainer(folder, [recorder], max_epochs=2)
    val = DataLoader([random_batch(index)["labeled"] for index in range(2)], batch_size=None)
    trainer.fit(module, loader(), val)
    trainer.save_checkpoint(folder / "last.ckpt")
    return trainer, module, recorder, folder / "last.ckpt"


def test_only_the_number_of_classes_is_required():
    module = MLPMatch(num_classes=21)
    assert module.method == PRESETS["mlpmatch"]
    assert module.segmentor.decoder.classifier.out_channels == 21
    expected = {"backbone": "resnet50s", "lr": 0.001, "lr_multi": 10.0, "confidence_threshold": 0.95, "power": 0.9}
    assert {key: module.hparams[key] for key in expected} == expected


def test_a_mapping_changes_a_preset():
    method = make_module(method={"name": "unimatch", "feature_weight": 0.1}).method
    assert (method.name, method.feature_weight, method.strong_weights) == ("unimatch", 0.1, (0.25, 0.25))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mlpmatsch"}, "but got 'mlpmatsch'. Did you mean mlpmatch"),
        ({"method": {"name": "mlpmatch", "lamda_max": 0.5}}, "method has no key 'lamda_max'. Did you mean lambda_max"),
        ({"method": {"partner": "self"}}, "expected method.partner as batch, flipped or same_image, but got 'self'"),
        ({"class_names": ["a", "b"]}, "expected 3 class names, but got 2"),
        ({"absent": "nan"}, "expected evaluation.absent as exclude or zero, but got 'nan'"),
        ({"in_chans": 1}, "expected mean and std with a value for each of the 1 channels, but got 3 and 3 values"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        make_module(**options)
    assert "\n" not in str(error.value)


def test_speed_and_memory_options_reach_the_network():
    fused = {"name": "SGD", "fused": True}
    module = make_module(channels_last=True, compile_blocks=True, activation_checkpointing=True, optimizer=fused)
    module.set_length(steps=10, epochs=1)
    assert module.segmentor.encoder.model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert module.segmentor.encoder._training_runner != make_module().segmentor.encoder._training_runner
    assert module.configure_optimizers()["optimizer"].defaults["fused"] is True


def test_metrics_are_logged(trained):
    metrics = trained[0].callback_metrics
    scores = {"val/miou", "val/acc", "val/dice", "val/iou/sky", "val/iou/road", "val/iou/tree"}
    assert {f"train/{key}" for key in TRAIN_KEYS} | scores <= set(metrics)
    assert all(value.isfinite() for value in metrics.values())


def test_all_parameters_are_trained(trained):
    before = make_module(**OPTIONS)
    parameters = dict(trained[1].named_parameters())
    assert [name for name, value in parameters.items() if torch.equal(value, before.get_parameter(name))] == []


def test_learning_rates_of_encoder_and_decoder_decay(trained):
    trainer, module, recorder, _ = trained
    encoder, decoder = trainer.optimizers[0].param_groups
    assert {id(p) for p in encoder["params"]} == {id(p) for p in module.segmentor.encoder.parameters()}
    assert {id(p) for p in decoder["params"]} == {id(p) for p in module.segmentor.decoder.parameters()}
    factors = [(1 - step / 6) ** 0.9 for step in range(6)]
    assert recorder.rates == [pytest.approx([0.01 * factor, 0.05 * factor]) for factor in factors]


def test_lambda_rises_by_epoch(trained):
    assert trained[2].lambdas == pytest.approx([0, 0, 0, 0.125, 0.125, 0.125])


def test_every_batch_has_its_own_draws(trained):
    assert trained[2].draws == [0, 1, 2, 3, 4, 5]


def test_accumulated_batches_have_their_own_draws_and_the_epochs_lambda(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, [recorder], max_epochs=2, accumulate_grad_batches=2)
    trainer.fit(make_module(), loader())
    assert recorder.steps == [0, 0, 1, 2, 2, 3]
    assert len(set(recorder.draws)) == 6
    assert recorder.lambdas == pytest.approx([0, 0, 0, 0.125, 0.125, 0.125])


class Endless(IterableDataset):
    """Batches without a known number, as from a stream."""

    def __iter__(self):
        return map(random_batch, range(100))


@pytest.mark.parametrize(
    ("method", "limits", "expected"),
    [
        ({"lambda_schedule": "linear_step"}, {"max_epochs": None, "max_steps": 2}, [0, 0.125]),
        ({"network_perturbation": None}, {"max_epochs": None, "max_steps": 1}, [0]),
        ({}, {"max_epochs": 2, "limit_train_batches": 1}, [0, 0.125]),
    ],
    ids=str,
)
def test_a_loader_without_length_needs_only_the_lengths_in_use(tmp_path, method, limits, expected):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, [recorder], **limits)
    trainer.fit(make_module(method={"name": "mlpmatch", **method}), DataLoader(Endless(), batch_size=None))
    assert recorder.lambdas == pytest.approx(expected)


@pytest.mark.parametrize(
    ("limits", "unit"), [({"max_epochs": None, "max_steps": 3}, "epochs"), ({"max_epochs": 2}, "steps")]
)
def test_an_unknown_length_is_asked_for(tmp_path, limits, unit):
    with pytest.raises(UserError, match=f"expected a known number of training {unit} .* set max_") as error:
        make_trainer(tmp_path, **limits).fit(make_module(), DataLoader(Endless(), batch_size=None))
    assert "\n" not in str(error.value)


def own_loop(module, fabric=None):
    """Train without a Trainer; return lambda, the seed of the draws and the deactivated blocks of every step."""
    model, optimizer = module, module.configure_optimizers()["optimizer"]
    if fabric is not None:
        model, optimizer = fabric.setup(module, optimizer)
    seen = []
    for index in range(4):
        seen.append((module.volatile_weight(), module.draw_step(0), module.deactivated_blocks(0)))
        loss = model.training_step(random_batch(index), index)
        optimizer.zero_grad()
        fabric.backward(loss) if fabric else loss.backward()
        optimizer.step()
        assert loss.isfinite()
    return seen


@pytest.mark.filterwarnings("ignore:.*self.trainer.*")
@pytest.mark.parametrize("with_fabric", [False, True])
def test_training_without_a_trainer_follows_its_length(with_fabric):
    module = make_module().train()
    module.set_length(steps=4, epochs=2)
    lambdas, draws, blocks = zip(
        *own_loop(module, Fabric(accelerator="cpu", devices=1) if with_fabric else None), strict=True
    )
    assert lambdas == (0, 0, 0.125, 0.125)
    assert draws == (0, 1, 2, 3)
    assert len(set(blocks)) > 1


@pytest.mark.filterwarnings("ignore:.*self.trainer.*")
def test_training_without_a_trainer_asks_for_the_length():
    with pytest.raises(UserError, match=r"training epochs for method\.lambda_schedule=linear_epoch.*set_length"):
        make_module().training_step(random_batch(), 0)
    with pytest.raises(UserError, match=r"training steps for the decay of the learning rate.*set_length"):
        make_module().configure_optimizers()
    with pytest.raises(UserError, match="at least one epoch with at least one step each, but got 3 steps and 4 epochs"):
        make_module().set_length(steps=3, epochs=4)
    unimatch = make_module(method="unimatch").train()
    assert unimatch.training_step(random_batch(), 0).isfinite()
    assert unimatch.own_step == 1


@pytest.mark.parametrize("size", [(1, 1), (20, 40), (40, 7), (35, 50)])
@torch.no_grad()
def test_forward_takes_images_of_any_size(size):
    image_BCHW = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    logits_BCHW = make_module().eval()(image_BCHW)
    assert tuple(logits_BCHW.shape) == (1, CLASSES, *size)
    assert logits_BCHW.isfinite().all()


def test_mixed_precision_keeps_logits_and_confidences_in_float32(tmp_path):
    module, features, logits, results = make_module(), [], [], []
    module.segmentor.encoder.register_forward_hook(lambda m, i, output: features.append(output.levels[-1].dtype))
    module.segmentor.decoder.register_forward_hook(lambda m, i, output: logits.append(output.dtype))
    step = module.step
    module.step = lambda *args: results.append(step(*args)) or results[-1]
    make_trainer(tmp_path, precision="bf16-mixed", max_steps=1).fit(module, loader(1))
    assert set(features) == {torch.bfloat16}
    assert set(logits) == {torch.float32}
    assert results[0].pseudo.confidence_BHW.dtype == torch.float32
    assert {term.dtype for term in results[0].terms.values()} == {torch.float32}


def is_plain_data(value):
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain_data(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(is_plain_data(item) for item in value)
    return value is None or type(value) in (bool, int, float, str)


def test_checkpoints_hold_tensors_and_plain_data(trained):
    content = torch.load(trained[3], weights_only=True)
    hparams = dict(content["hyper_parameters"])
    assert is_plain_data(hparams), hparams
    assert hparams["num_classes"] == CLASSES
    assert set(content["state_dict"]) == set(trained[1].state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": {"channels": 16}}, "it has decoder={'name': 'deeplabv3plus', 'channels': 8, "),
        ({"backbone": "resnet18"}, "it has backbone=test_resnet and the configuration backbone=resnet18"),
        ({"decoder": {"channels": 8, "atrous_rates": [12, 24, 36]}}, "'atrous_rates': [12, 24, 36]}; resume with the"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused(trained, tmp_path, options, message):
    module = make_module(**options)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(UserError, match=re.escape(message)) as error:
        make_trainer(tmp_path, max_epochs=3).fit(module, loader(), ckpt_path=trained[3], weights_only=True)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_resuming_continues_at_the_saved_step(trained, tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, [recorder], max_epochs=3)
    trainer.fit(make_module(**OPTIONS), loader(), ckpt_path=trained[3], weights_only=True)
    assert recorder.steps == recorder.draws == [6, 7, 8]


@pytest.mark.parametrize("step", ["training_step", "validation_step"])
def test_values_of_a_batch_are_checked(step):
    def call(image, mask):
        module = MLPMatch(3, method="supervised", backbone="test_resnet", decoder={"channels": 8})
        batch = {"image": image, "mask": mask}
        getattr(module, step)({"labeled": batch} if step == "training_step" else batch, 0)

    image = torch.randint(0, 256, (2, 3, 33, 33), dtype=torch.uint8)
    mask = torch.randint(0, 3, (2, 33, 33), dtype=torch.uint8)
    mask[0, 0, 0] = 255
    call(image, mask)
    call(image.float(), mask.long())
    with pytest.raises(UserError, match=r"has float32 from 0\.00 to 1\.00; do not scale or normalize images"):
        call(image / 255, mask)
    with pytest.raises(UserError, match=r"has float32 from -\d"):
        call((image - 120.0) / 50, mask)
    for wrong in (7, -1):
        mask = mask.long()
        mask[1, 2, 3] = wrong
        with pytest.raises(
            UserError, match=rf"expected mask values 0\.\.2 or 255 \(ignore\), but the batch has {wrong};"
        ):
            call(image, mask)


def test_later_batches_and_those_after_a_validation_are_checked_too():
    module = MLPMatch(3, method="supervised", backbone="test_resnet", decoder={"channels": 8})
    good = {"image": torch.full((2, 3, 33, 33), 99.0), "mask": torch.ones(2, 33, 33, dtype=torch.long)}
    bad = {**good, "mask": good["mask"] + 7}
    module.validation_step(good, 0)
    for training_batches in ([], [good]):
        for batch_idx, batch in enumerate(training_batches):
            module.training_step({"labeled": batch}, batch_idx)
        with pytest.raises(UserError, match="the batch has 8;"):
            module.training_step({"labeled": bad}, len(training_batches))
    with pytest.raises(UserError, match="the batch has 8;"):
        module.validation_step(bad, 1)


# In other people's programs -------------------------------------------------------------------------------------------


def test_a_trained_module_is_pickled_copied_and_saved_whole(trained):
    module, image = trained[1], torch.full((1, 3, 33, 33), 99.0)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin.eval()(image), module.eval()(image))


@pytest.mark.parametrize("copied", [lambda data: pickle.loads(pickle.dumps(data)), copy.deepcopy])
def test_a_data_module_is_pickled_and_copied_after_training(copied, tmp_path):
    data = small_data()
    module = MLPMatch(len(data.data.class_names), backbone="test_resnet", decoder={"channels": 8})
    make_trainer(tmp_path, limit_train_batches=1).fit(module, data)
    twin = copied(data)
    assert twin.trainer is None
    assert data.trainer is not None
    expected, batch = next(iter(data.val_dataloader())), next(iter(twin.val_dataloader()))
    assert torch.equal(batch["image"], expected["image"])


def small_data():
    return SemiSupervisedDataModule(shapes(labeled=4, train=8, val=1), batch_size=2, crop_size=33, num_workers=0)


def test_overfit_batches_repeats_one_batch(tmp_path):
    images = []

    class Batches(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            images.append(batch["labeled"]["image"])

    module, before = make_module(6), make_module(6).state_dict()
    make_trainer(tmp_path, [Batches()], overfit_batches=1, max_epochs=2).fit(module, small_data())
    first, second = images
    assert first.shape == (2, 3, 33, 33)
    assert torch.equal(first, second)
    assert not torch.equal(module.state_dict()[CLASSIFIER], before[CLASSIFIER])


@pytest.mark.slow
def test_two_processes_train_what_is_pickled_to_them(tmp_path):
    """As with ``ddp_spawn``, but they need not import everything first."""
    strategy = DDPStrategy(start_method=FORKS.get_start_method())
    module, before = make_module(6), make_module(6).state_dict()
    trainer = make_trainer(tmp_path, strategy=strategy, devices=2, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(module, small_data())
    assert trainer.world_size == 2
    assert trainer.callback_metrics["train/loss"].isfinite()
    assert not torch.equal(module.state_dict()[CLASSIFIER], before[CLASSIFIER])


@pytest.mark.parametrize("wrap", [lambda image: image, lambda image: {"image": image}, lambda image: (image, 0)])
def test_predict_takes_plain_tensors_mappings_and_tuples(wrap, tmp_path):
    images = DataLoader([wrap(torch.full((3, 20, 30), 99, dtype=torch.uint8))] * 2)
    assert [tuple(part.shape) for part in make_trainer(tmp_path).predict(make_module(), images)] == [(1, 20, 30)] * 2


@pytest.mark.parametrize(
    ("stage", "sample", "message"),
    [
        (
            "validate",
            (torch.zeros(3, 33, 33), torch.zeros(33, 33)),
            "expected an evaluation batch of {'image': (B, C, H",
        ),
        ("test", {"image": torch.zeros(3, 33, 33)}, "but got the keys image; let the dataset return dictionaries"),
        ("test", {"image": torch.rand(3, 33, 33), "mask": torch.zeros(33, 33).long()}, "the batch has float32 from"),
        ("predict", torch.rand(3, 33, 33), "with values as stored in files, such as 0 to 255, but the batch has float"),
        (
            "predict",
            {"mask": torch.zeros(3, 33, 33)},
            "expected images (B, C, H, W) to predict, or {'image': ...}, but",
        ),
        ("fit", (torch.zeros(3, 33, 33), torch.zeros(33, 33)), "expected a training batch of {'labeled': ..., 'unlabe"),
    ],
)
def test_other_batches_are_refused_in_one_sentence(stage, sample, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        getattr(make_trainer(tmp_path), stage)(make_module(), DataLoader([sample]))
