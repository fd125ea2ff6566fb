import copy

import pytest
import torch
from helpers.batches import make_batch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from mlpmatch_pl import MLPMatch, Segmentor
from mlpmatch_pl.methods.teacher import Teacher
from mlpmatch_pl.utils.errors import UserError

STEPS, DECAY = 20, 0.8
TEACHER = {"decay": DECAY, "ramp": True}


@pytest.fixture
def student():
    torch.manual_seed(0)
    return Segmentor(3, backbone="test_resnet", decoder={"channels": 8}).double()


def train_a_step(student, optimizer, step):
    generator = torch.Generator().manual_seed(step)
    image = torch.rand(2, 3, 33, 33, generator=generator, dtype=torch.float64) * 255
    optimizer.zero_grad()
    student(image).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("ramp", [True, False])
def test_the_average_equals_a_plain_reference_over_20_steps(student, ramp):
    teacher = Teacher(student, DECAY, ramp)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    expected = {}
    for step in range(STEPS):
        train_a_step(student, optimizer, step)
        teacher.update(student, step)
        decay = min(1 - 1 / (step + 1), DECAY) if ramp else (DECAY if step else 0)
        for name, value in student.state_dict().items():
            previous = expected.get(name, torch.zeros_like(value))
            expected[name] = decay * previous + (1 - decay) * value if value.is_floating_point() else value.clone()
    averaged = teacher.network.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(averaged[name], value, rtol=1e-12, atol=1e-14, msg=name)
    assert averaged["encoder.model.bn1.num_batches_tracked"] == STEPS
    different = [name for name, value in student.state_dict().items() if not torch.equal(value, averaged[name])]
    assert len(different) > 100  # weights and statistics


def test_it_stays_in_eval_mode_and_without_gradients(student):
    teacher = Teacher(student, DECAY)
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    before = copy.deepcopy(teacher.state_dict())
    assert not teacher(torch.rand(2, 3, 33, 33, dtype=torch.float64)).requires_grad
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_decay_out_of_range_is_refused(student):
    with pytest.raises(UserError, match=r"method.teacher.decay from 0 to below 1, but got 1"):
        Teacher(student, 1.0)


def make_module(**method):
    torch.manual_seed(0)
    spec = {"name": "fixmatch", "teacher": TEACHER, **method}
    return MLPMatch(3, method=spec, backbone="test_resnet", decoder={"channels": 8}, lr=0.01)


def test_it_follows_the_optimizer_in_a_loop_of_ones_own():
    module = make_module()
    module.set_length(steps=3, epochs=1)
    optimizer = module.configure_optimizers()["optimizer"]
    expected = {}
    for step in range(3):
        optimizer.zero_grad()
        module.training_step(make_batch(2, 2, 1, (33, 33), 3, seed=step), step).backward()
        optimizer.step()
        for name, weight in module.segmentor.named_parameters():
            decay = min(1 - 1 / (step + 1), DECAY)
            expected[name] = decay * expected.get(name, 0) + (1 - decay) * weight.detach()
    for name, weight in module.teacher.network.named_parameters():
        torch.testing.assert_close(weight, expected[name], msg=name)


class PlainAverage(Callback):
    """The average as the paper describes it, from the student's weights after each step."""

    def __init__(self):
        self.weights, self.step = {}, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        decay = min(1 - 1 / (self.step + 1), DECAY)
        for name, weight in pl_module.segmentor.named_parameters():
            self.weights[name] = decay * self.weights.get(name, 0) + (1 - decay) * weight.detach()
        self.step += 1


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.filterwarnings("ignore:.*")
def test_it_follows_the_optimizer_under_a_trainer(accumulated):
    module, plain = make_module(), PlainAverage()
    data = [make_batch(2, 2, 1, (33, 33), 3, seed=step) for step in range(8)]
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, accumulate_grad_batches=accumulated, callbacks=[plain], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, precision="64-true",
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=None))
    assert plain.step == 8 // accumulated
    for name, weight in module.teacher.network.named_parameters():
        torch.testing.assert_close(weight, plain.weights[name], rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_pseudo_labels_come_from_where_the_method_says(source):
    module = make_module(pseudo_labels=source, cutmix={"p": 0.0, "area": [0.02, 0.4], "ratio": [0.3, 3]}).train()
    for weight in module.teacher.network.decoder.classifier.parameters():
        torch.nn.init.zeros_(weight)
    module.teacher.network.decoder.classifier.bias.data[1] = 9.0  # the teacher is sure of class 1
    batch = make_batch(2, 2, 1, (33, 33), 3)
    pseudo = module.step(batch["labeled"], batch["unlabeled"], 0).pseudo
    assert bool((pseudo.label_BHW == 1).all() and (pseudo.confidence_BHW > 0.99).all()) == (source == "teacher")


def test_the_teacher_is_evaluated_and_both_are_logged(tmp_path):
    module = make_module().eval()
    module.teacher.network.decoder.classifier.bias.data[2] += 99.0
    image = torch.zeros(1, 3, 33, 33, dtype=torch.uint8)
    assert (module(image).argmax(1) == 2).all()
    assert not (module.segmentor(image).argmax(1) == 2).all()
    logged = {}
    module.log = lambda key, value: logged.update({key: value})
    module.log_dict = logged.update
    module.validation_step({"image": image, "mask": torch.full((1, 33, 33), 2, dtype=torch.uint8)}, 0)
    module.on_validation_epoch_end()
    assert logged["val/miou"] == 1.0 > logged["val/student_miou"]
