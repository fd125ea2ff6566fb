"""The LightningModule with random tensors from a foreign loader, on the CPU."""

import re

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, IterableDataset

from mlpmatch_pl import MLPMatch, UserError
from mlpmatch_pl.methods.method import PRESETS
from mlpmatch_pl.methods.schedules import poly_decay

CLASSES, SIZE = 3, 33
TRAIN_KEYS = {"loss", "loss_x", "loss_x_np", "loss_s", "loss_fp", "loss_u_np", "confident_ratio", "lambda_np", "lr"}
SUPERVISED_KEYS = {"loss", "loss_x", "lambda_np", "lr"}


def make_module(**options):
    torch.manual_seed(0)
    return MLPMatch(CLASSES, **{"backbone": "test_resnet", "decoder_channels": 8, **options})


def random_batch(index=0):
    rng = torch.Generator().manual_seed(index)

    def images(*shape):
        return torch.randint(0, 256, (*shape, 3, SIZE, SIZE), dtype=torch.uint8, generator=rng)

    labeled = {
        "image": images(2),
        "mask": torch.randint(0, CLASSES, (2, SIZE, SIZE), dtype=torch.uint8, generator=rng),
    }
    valid_BHW = torch.ones(2, SIZE, SIZE, dtype=torch.bool)
    unlabeled = {
        "weak": images(2),
        "strong": images(2, 2),
        "valid": valid_BHW,
        "boxes": torch.tensor([[[4, 5, 20, 25]] * 2] * 2),
        "index": torch.arange(2),
        "partner": {"weak": images(2), "strong": images(2, 2), "valid": valid_BHW},
    }
    return {"labeled": labeled, "unlabeled": unlabeled}


def loaders(batches=2, halves=("labeled", "unlabeled")):
    train = [{half: random_batch(index)[half] for half in halves} for index in range(batches)]
    return DataLoader(train, batch_size=None), DataLoader([batch["labeled"] for batch in train], batch_size=None)


def make_trainer(tmp_path, callbacks=(), **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    place = {"accelerator": "cpu", "devices": 1, "default_root_dir": tmp_path, "logger": False}
    limits = {"max_epochs": 1, "log_every_n_steps": 1, "num_sanity_val_steps": 0}
    return Trainer(**{**quiet, **place, **limits, **options}, callbacks=list(callbacks))


class Recorder(Callback):
    """Keeps a value of every training batch."""

    def __init__(self, value):
        self.value, self.values = value, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(self.value(trainer))


def test_only_the_number_of_classes_is_needed():
    module = MLPMatch(num_classes=21)
    assert module.method == PRESETS["mlpmatch"]
    assert module.segmentor.decoder.classifier.out_channels == 21
    expected = {"backbone": "resnet50s", "lr": 0.001, "lr_multi": 10.0, "confidence_threshold": 0.95, "power": 0.9}
    assert {key: module.hparams[key] for key in expected} == expected


@pytest.mark.parametrize("name", ["mlpmatch", "mlpmatch_official", "unimatch", "fixmatch", "supervised"])
def test_presets_go_by_name(name):
    assert make_module(method=name).method == PRESETS[name]


def test_a_mapping_changes_a_preset():
    method = make_module(method={"name": "unimatch", "feature_weight": 0.1}).method
    assert (method.feature_weight, method.strong_weights) == (0.1, (0.25, 0.25))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "mlpmatsch"}, "but got 'mlpmatsch'. Did you mean mlpmatch"),
        ({"method": {"name": "mlpmatch", "lamda_max": 0.5}}, "method has no key 'lamda_max'. Did you mean lambda_max"),
        ({"method": {"partner": "self"}}, "expected method.partner of batch, same_image, but got 'self'."),
        ({"class_names": ["a", "b"]}, "expected 3 class names, but got 2"),
        ({"absent": "nan"}, "expected evaluation.absent as exclude or zero, but got 'nan'"),
        ({"in_chans": 1}, "expected mean and std with a value for each of the 1 channels, but got 3 and 3 values"),
    ],
)
def test_wrong_arguments_are_refused_by_one_sentence(options, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        make_module(**options)
    assert "\n" not in str(error.value)


def test_late_poly_decay_lags_one_step():
    assert [round(poly_decay(step, 10, 0.9, late=True), 4) for step in range(4)] == [1.0, 1.0, 0.9095, 0.8181]
    assert [round(poly_decay(step, 10, 0.9, late=False), 4) for step in range(3)] == [1.0, 0.9095, 0.8181]


def test_poly_decay_is_clamped():
    for late in (False, True):
        factors = [poly_decay(step, 10, 0.9, late) for step in range(30)]
        assert all(isinstance(factor, float) for factor in factors)
        assert sorted(factors, reverse=True) == factors
        assert factors[11:] == [0.0] * 19
    assert poly_decay(0, 0, 0.9, late=False) == 1.0


@pytest.mark.parametrize(("method", "late"), [("mlpmatch", False), ("mlpmatch_official", True)])
def test_encoder_learns_at_lr_and_decoder_at_its_multiple(tmp_path, method, late):
    module = make_module(method=method, lr=0.01, lr_multi=5.0, momentum=0.8, weight_decay=0.002)
    seen = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    trainer = make_trainer(tmp_path, [Rates()], max_epochs=2)
    trainer.fit(module, loaders(3)[0])
    encoder, decoder = trainer.optimizers[0].param_groups
    assert {id(p) for p in encoder["params"]} == {id(p) for p in module.segmentor.encoder.parameters()}
    assert {id(p) for p in decoder["params"]} == {id(p) for p in module.segmentor.decoder.parameters()}
    assert (encoder["initial_lr"], decoder["initial_lr"]) == (0.01, 0.05)
    assert {(group["momentum"], group["weight_decay"]) for group in (encoder, decoder)} == {(0.8, 0.002)}
    factors = [(1 - max(step - late, 0) / 6) ** 0.9 for step in range(6)]
    assert seen == [pytest.approx([0.01 * factor, 0.05 * factor]) for factor in factors]


@pytest.mark.parametrize("method", ["mlpmatch", "mlpmatch_official", "supervised"])
def test_metrics_are_logged_under_their_names(tmp_path, method):
    trainer = make_trainer(tmp_path)
    halves = ("labeled", "unlabeled")[: 1 + (method != "supervised")]
    trainer.fit(make_module(method=method, class_names=["sky", "road", "tree"]), *loaders(halves=halves))
    keys = SUPERVISED_KEYS if method == "supervised" else TRAIN_KEYS
    scores = {"val/miou", "val/acc", "val/dice", "val/iou/sky", "val/iou/road", "val/iou/tree"}
    assert {f"train/{key}" for key in keys} | scores <= set(trainer.callback_metrics)
    assert all(value.isfinite() for value in trainer.callback_metrics.values())


def test_training_changes_every_parameter(tmp_path):
    module, before = make_module(), make_module()
    make_trainer(tmp_path).fit(module, loaders()[0])
    unchanged = {name for name, value in module.named_parameters() if torch.equal(value, before.get_parameter(name))}
    assert unchanged == set()


def lambda_of(trainer):
    return trainer.callback_metrics["train/lambda_np"].item()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear_epoch", [0, 0, 0.05, 0.05, 0.1, 0.1, 0.15, 0.15]),
        ("linear_step", [0, 0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.175]),
        ("constant", [0.2] * 8),
        ("off", [0] * 8),
    ],
)
def test_lambda_rises_as_scheduled(tmp_path, schedule, expected):
    recorder = Recorder(lambda_of)
    method = {"name": "mlpmatch", "lambda_max": 0.2, "lambda_schedule": schedule}
    make_trainer(tmp_path, [recorder], max_epochs=4).fit(make_module(method=method), loaders(2)[0])
    assert recorder.values == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    "batches",
    [
        4,
        3,
    ],
)
def test_lambda_rises_by_epoch_with_accumulated_gradients(tmp_path, batches):
    recorder = Recorder(lambda_of)
    trainer = make_trainer(tmp_path, [recorder], max_epochs=4, accumulate_grad_batches=2)
    trainer.fit(make_module(), loaders(batches)[0])
    assert recorder.values[::batches] == pytest.approx([0, 0.0625, 0.125, 0.1875])


def test_lambda_is_zero_without_network_perturbation(tmp_path):
    recorder = Recorder(lambda_of)
    method = {"name": "mlpmatch", "network_perturbation": None, "lambda_schedule": "constant"}
    make_trainer(tmp_path, [recorder]).fit(make_module(method=method), loaders()[0])
    assert recorder.values == [0, 0]


class Endless(IterableDataset):
    """Batches without a number, as those of a stream."""

    def __iter__(self):
        return map(random_batch, range(100))


def endless():
    return DataLoader(Endless(), batch_size=None)


def lambdas(tmp_path, loader, method, limits, **options):
    recorder = Recorder(lambda_of)
    spec = {"name": "mlpmatch", "lambda_max": 0.2, **method}
    make_trainer(tmp_path, [recorder], **limits).fit(make_module(method=spec, **options), loader)
    return recorder.values


@pytest.mark.parametrize(
    ("method", "options", "limits", "expected"),
    [
        ({"lambda_schedule": "linear_step"}, {}, {"max_epochs": None, "max_steps": 4}, [0, 0.05, 0.1, 0.15]),
        ({"lambda_schedule": "constant"}, {}, {"max_epochs": None, "max_steps": 2}, [0.2, 0.2]),
        ({"lambda_max": 0.0}, {}, {"max_epochs": None, "max_steps": 2}, [0, 0]),
        ({"network_perturbation": None}, {}, {"max_epochs": None, "max_steps": 2}, [0, 0]),
        ({}, {}, {"max_epochs": 2, "limit_train_batches": 2}, [0, 0, 0.1, 0.1]),
        (
            {"lambda_schedule": "constant"},
            {"power": 0.0},
            {"max_epochs": -1, "max_time": "00:00:00:01", "limit_train_batches": 1},
            None,
        ),
    ],
    ids=str,
)
def test_an_endless_loader_needs_only_the_lengths_that_are_used(tmp_path, method, options, limits, expected):
    values = lambdas(tmp_path, endless(), method, limits, **options)
    assert values == pytest.approx(expected or [0.2] * len(values))
    assert values


@pytest.mark.parametrize(
    ("method", "options", "limits", "what"),
    [
        ({}, {}, {"max_epochs": None, "max_steps": 3}, "epochs for method.lambda_schedule=linear_epoch"),
        ({}, {}, {"max_epochs": 2}, "steps, over which the learning rate decays"),  # Lightning says -1
        ({"lambda_schedule": "constant"}, {}, {"max_epochs": -1}, "steps, over which the learning rate decays"),
        (
            {"lambda_schedule": "linear_step"},
            {"power": 0.0},
            {"max_epochs": -1},
            "steps for method.lambda_schedule=linear_step",
        ),
    ],
    ids=str,
)
def test_a_length_that_nobody_knows_is_asked_for_by_one_sentence(tmp_path, method, options, limits, what):
    with pytest.raises(UserError, match=re.escape(f"expected to know the number of training {what}")) as error:
        lambdas(tmp_path, endless(), method, limits, **options)
    assert "\n" not in str(error.value)
    assert " set max_" in str(error.value)


def own_loop(module, fabric=None):
    """Train without a Trainer; return lambda, and the number that seeds the draws, of every step."""
    model, optimizer = module, module.configure_optimizers()["optimizer"]
    if fabric is not None:
        model, optimizer = fabric.setup(module, optimizer)
    seen = []
    for index in range(4):
        seen.append((round(module.volatile_weight(), 4), module.draw_step(0), module.deactivated_blocks(0)))
        loss = model.training_step(random_batch(index), index)
        optimizer.zero_grad()
        fabric.backward(loss) if fabric else loss.backward()
        optimizer.step()
        assert loss.isfinite()
    return seen


@pytest.mark.filterwarnings("ignore:.*self.trainer.*")
@pytest.mark.parametrize("with_fabric", [False, True])
def test_a_loop_without_a_trainer_draws_anew_in_every_step_and_follows_its_length(with_fabric):
    module = make_module()
    module.set_length(steps=4, epochs=2)
    seen = own_loop(module.train(), Fabric(accelerator="cpu", devices=1) if with_fabric else None)
    assert [value for value, _, _ in seen] == [0, 0, 0.125, 0.125]
    assert [number for _, number, _ in seen] == [0, 1, 2, 3]
    assert len({blocks for _, _, blocks in seen}) > 1


@pytest.mark.filterwarnings("ignore:.*self.trainer.*")
def test_a_loop_without_a_trainer_that_says_no_length_is_refused():
    with pytest.raises(UserError, match=r"method\.lambda_schedule=linear_epoch, but nothing says it.*set_length"):
        make_module().training_step(random_batch(), 0)
    with pytest.raises(UserError, match=r"over which the learning rate decays, but nothing says it.*set_length"):
        make_module().configure_optimizers()
    with pytest.raises(UserError, match="expected at least one epoch, and a step in each, but got 3 steps, 4 epochs"):
        make_module().set_length(steps=3, epochs=4)
    unimatch = make_module(method="unimatch").train()
    assert unimatch.training_step(random_batch(), 0).isfinite()
    assert unimatch.own_step == 1


def without(batch, half, key):
    return {**batch, half: {name: value for name, value in batch[half].items() if name != key}}


def with_views(batch, views):
    unlabeled = batch["unlabeled"]
    more = {name: unlabeled[name][:, :1].repeat_interleave(views, 1) for name in ("strong", "boxes")}
    return {**batch, "unlabeled": {**unlabeled, **more}}


BATCH = random_batch()


@pytest.mark.parametrize(
    ("method", "batch", "sentence"),
    [
        ("unimatch", with_views(BATCH, 1), "expected unlabeled.strong of shape (2, 2, 3, 33, 33) in batches for method "
         "unimatch, but got (2, 1, 3, 33, 33); build SemiSupervisedDataModule with the module's method"),
        ("unimatch", with_views(BATCH, 3), "but got (2, 3, 3, 33, 33)"),
        ("fixmatch", BATCH, "expected unlabeled.strong of shape (2, 1, 3, 33, 33) in batches for method fixmatch"),
        ("unimatch", {"labeled": BATCH["labeled"]}, "expected unlabeled.weak of shape (U, 3, 33, 33) in batches for "
         "method unimatch, but there is none"),
        ("supervised", BATCH, "expected labeled images only for method supervised, but the batch has unlabeled ones"),
        ("mlpmatch_official", without(BATCH, "unlabeled", "partner"), "expected unlabeled.partner.weak of shape"),
        ("unimatch", without(BATCH, "labeled", "mask"), "expected labeled.mask of shape (2, 33, 33)"),
        ("unimatch", {"image": BATCH["labeled"]["image"]}, "expected labeled.image of shape (B, 3, H, W)"),
        ("supervised", {"labeled": {name: value[:, :1] for name, value in BATCH["labeled"].items()}},
         "expected labeled.image of shape (B, 3, H, W) in batches for method supervised, but got (2, 1, 33, 33)"),
        ("unimatch", [BATCH], "expected a training batch of {'labeled': ..., 'unlabeled': ...}, but got a list"),
    ],
)  # fmt: skip
def test_a_batch_that_does_not_fit_the_method_is_refused_by_one_sentence(tmp_path, method, batch, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        make_trainer(tmp_path).fit(make_module(method=method), DataLoader([batch], batch_size=None))
    assert "\n" not in str(error.value)


def test_a_batch_of_another_form_is_refused_after_ones_that_fit(tmp_path):
    batches = [BATCH, BATCH, with_views(BATCH, 1)]
    with pytest.raises(UserError, match=r"expected unlabeled\.strong of shape"):
        make_trainer(tmp_path).fit(make_module(method="unimatch"), DataLoader(batches, batch_size=None))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_batch_has_draws_of_its_own(tmp_path, accumulate):
    module, steps = make_module(), []
    step = module.step
    module.step = lambda labeled, unlabeled, number: steps.append(number) or step(labeled, unlabeled, number)
    make_trainer(tmp_path, max_epochs=2, accumulate_grad_batches=accumulate).fit(module, loaders(3)[0])
    assert len(set(steps)) == len(steps) == 6
    assert steps == sorted(steps)


@pytest.mark.parametrize("size", [(1, 1), (20, 40), (40, 7), (33, 33), (35, 50)])
@torch.no_grad()
def test_forward_takes_images_of_any_size(size):
    image_BCHW = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    logits_BCHW = make_module().eval()(image_BCHW)
    assert tuple(logits_BCHW.shape) == (1, CLASSES, *size)
    assert logits_BCHW.isfinite().all()


@pytest.mark.parametrize("method", ["mlpmatch", "mlpmatch_official"])
def test_mixed_precision_keeps_logits_and_confidence_in_float32(tmp_path, method):
    module, features, logits, results = make_module(method=method), [], [], []
    module.segmentor.encoder.register_forward_hook(lambda m, i, output: features.append(output.levels[-1].dtype))
    module.segmentor.decoder.register_forward_hook(lambda m, i, output: logits.append(output.dtype))
    module.segmentor.register_forward_hook(lambda m, i, output: logits.append(output.dtype))
    step = module.step
    module.step = lambda *args: results.append(step(*args)) or results[-1]
    make_trainer(tmp_path, precision="bf16-mixed", max_steps=1).fit(module, loaders()[0])
    assert set(features) == {torch.bfloat16}
    assert set(logits) == {torch.float32}
    assert results[0].pseudo.confidence_BHW.dtype == torch.float32
    assert {term.dtype for term in results[0].terms.values()} == {torch.float32}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    module = make_module(
        method={"name": "mlpmatch", "lambda_max": 0.1},
        criterion={"name": "ce", "class_weights": [1.0, 2.0, 0.5]},
        class_names=["a", "b", "c"],
    )
    trainer = make_trainer(folder)
    trainer.fit(module, loaders()[0])
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt", module.eval()


def plain_data(value):
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain_data(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(plain_data(item) for item in value)
    return value is None or type(value) in (bool, int, float, str)


def test_checkpoint_holds_tensors_and_plain_data(checkpoint):
    content = torch.load(checkpoint[0], weights_only=True)
    hparams = dict(content["hyper_parameters"])
    assert plain_data(hparams), hparams
    assert hparams["num_classes"] == CLASSES
    assert set(content["state_dict"]) == set(checkpoint[1].state_dict())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"decoder_channels": 16}, "it has decoder_channels=8 and the configuration decoder_channels=16"),
        ({"backbone": "test_resnet", "output_stride": 8}, "it has output_stride=16 and the configuration output_str"),
        ({"backbone": "resnet18"}, "it has backbone=test_resnet and the configuration backbone=resnet18"),
        ({"atrous_rates": [12, 24, 36]}, "it has atrous_rates=(6, 12, 18) and the configuration atrous_rates=[12, 24"),
    ],
)
def test_resume_refuses_another_architecture(checkpoint, tmp_path, options, sentence):
    module = make_module(**options)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        make_trainer(tmp_path, max_epochs=2).fit(module, loaders()[0], ckpt_path=checkpoint[0], weights_only=True)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_resume_goes_on_with_the_saved_step(checkpoint, tmp_path):
    module = make_module(atrous_rates=[6, 12, 18], criterion={"name": "ce", "class_weights": [1.0, 2.0, 0.5]})
    recorder = Recorder(lambda trainer: trainer.global_step)
    trainer = make_trainer(tmp_path, [recorder], max_epochs=2)
    trainer.fit(module, loaders()[0], ckpt_path=checkpoint[0], weights_only=True)
    assert recorder.values == [3, 4]
