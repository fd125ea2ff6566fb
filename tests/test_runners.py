"""Compiled and checkpointed blocks, and atrous convolutions on small crops: the same result, faster or smaller."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from helpers import compose_train
from torch import nn

from mlpmatch_pl import MLPMatch
from mlpmatch_pl.segmentor import Segmentor
from mlpmatch_pl.segmentor.deeplabv3plus import AtrousConv2d
from mlpmatch_pl.segmentor.runners import block_runner
from mlpmatch_pl.trainer import MODULE_OPTIONS

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # scripts, not a package

from step_timing import LivingTensors


def segmentor_like(other=None, **options):
    torch.manual_seed(0)
    segmentor = Segmentor(4, backbone="test_resnet", decoder_channels=8, **options).double().train()
    if other is not None:
        segmentor.load_state_dict(other.state_dict())
    return segmentor


def run_forked(segmentor, deactivated=frozenset({2})):
    """A plain and a deactivated pass with gradients, as in a training step."""
    x = torch.randint(0, 256, (2, 3, 65, 65), generator=torch.Generator().manual_seed(0))
    plain, perturbed = segmentor.encode_forked(x, deactivated)
    loss = segmentor.decode(plain, (65, 65)).square().mean() + segmentor.decode(perturbed, (65, 65)).square().mean()
    loss.backward()
    return loss


def assert_same(one, other, **tolerance):
    for (name, first), second in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad, msg=name, **tolerance)
    for (name, first), second in zip(one.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(first, second, msg=name, **tolerance)


def test_checkpointed_blocks_change_neither_gradients_nor_running_statistics():
    plain = segmentor_like()
    checkpointed = segmentor_like(plain, activation_checkpointing=True)
    assert run_forked(plain).item() == run_forked(checkpointed).item()
    assert_same(plain, checkpointed, rtol=0, atol=0)
    counted = [norm.num_batches_tracked.item() for norm in plain.modules() if isinstance(norm, nn.BatchNorm2d)]
    assert set(counted) == {1, 2}  # the shared prefix once, the rest in both passes
    assert {norm.momentum for norm in checkpointed.modules() if isinstance(norm, nn.BatchNorm2d)} == {0.1}


def test_checkpointed_blocks_keep_less():
    def kept(segmentor):
        with LivingTensors() as living:
            features = segmentor.encode(torch.rand(2, 3, 129, 129))
            assert features.levels[0].requires_grad
            return living.now

    assert kept(segmentor_like(activation_checkpointing=True)) < 0.8 * kept(segmentor_like())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_blocks_give_the_same(checkpointed):
    plain = segmentor_like()
    compiled = segmentor_like(plain)
    compiled.encoder._run_in_training = block_runner(compiled=True, checkpointed=checkpointed, backend="aot_eager")
    for deactivated in (frozenset({2}), frozenset({0, 3})):
        assert run_forked(plain, deactivated).item() == pytest.approx(
            run_forked(compiled, deactivated).item(), rel=1e-9
        )
    assert_same(plain, compiled, rtol=1e-6, atol=1e-9)


def test_compiled_blocks_are_compiled_once_and_only_for_training():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    segmentor = segmentor_like()
    segmentor.encoder._run_in_training = block_runner(compiled=True, checkpointed=False, backend=backend)
    torch._dynamo.reset()
    with torch.no_grad():
        segmentor.eval()(torch.rand(1, 3, 49, 81))
        assert not compiled
    segmentor.train()
    for block in range(len(segmentor.encoder.blocks)):
        run_forked(segmentor, frozenset({block}))
    assert 0 < len(compiled) <= 2 * len(segmentor.encoder.blocks)  # whichever blocks are deactivated


def test_compiled_blocks_keep_the_names_of_weights_and_copy():
    module = MLPMatch(4, backbone="test_resnet", decoder_channels=8, compile_blocks=True)
    plain = MLPMatch(4, backbone="test_resnet", decoder_channels=8)
    assert list(module.state_dict()) == list(plain.state_dict())
    run = module.segmentor.encoder._run_in_training
    run._compiled[module.segmentor.encoder.blocks[0]] = lambda x: x
    copied = copy.deepcopy(module).segmentor.encoder._run_in_training
    assert copied.backend == "inductor"
    assert not copied._compiled  # it compiles its own blocks, not those it was copied from


@pytest.mark.parametrize("size", [(7, 9), (12, 13), (12, 6), (20, 5), (25, 25), (1, 1)])
def test_taps_that_see_only_padding_are_left_out_without_a_difference(size):
    torch.manual_seed(0)
    own = AtrousConv2d(3, 4, dilation=12).double().train()
    plain = nn.Conv2d(3, 4, 3, padding=12, dilation=12, bias=False).double()
    plain.load_state_dict(own.state_dict())
    inputs = [torch.randn(2, 3, *size, dtype=torch.float64).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    outputs = [own(inputs[0]), plain(inputs[1])]
    weight = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weight).sum().backward()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own.weight.grad, plain.weight.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own.eval()(inputs[0]), outputs[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("option", ["compile_blocks", "activation_checkpointing", "fused_optimizer"])
def test_options_reach_the_module(option, tmp_path):
    cfg = compose_train(f"trainer.{option}=true", output_dir=tmp_path)
    assert cfg.trainer[option] is True
    assert option in MODULE_OPTIONS
    module = MLPMatch(4, backbone="test_resnet", decoder_channels=8, **{option: True})
    assert module.hparams[option] is True


def test_the_fused_optimizer_updates_as_the_plain_one(tmp_path):
    updated = []
    for fused in (False, True):
        torch.manual_seed(0)
        module = MLPMatch(4, backbone="test_resnet", decoder_channels=8, fused_optimizer=fused)
        module._trainer = type("T", (), {"estimated_stepping_batches": 10})()
        optimizer = module.configure_optimizers()["optimizer"]
        assert bool(optimizer.defaults["fused"]) is fused
        for _ in range(2):
            for parameter in module.parameters():
                parameter.grad = torch.full_like(parameter, 0.1)
            optimizer.step()
        updated.append(module.segmentor.decoder.classifier.weight.detach())
    torch.testing.assert_close(updated[0], updated[1])


def test_a_step_logs_tensors_of_its_device_alone(monkeypatch):
    """Of numbers Lightning makes tensors on the device, and waits for each."""
    module = MLPMatch(4, backbone="test_resnet", decoder_channels=8)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    module._trainer = type("T", (), {"optimizers": [optimizer]})()
    logged = {}
    monkeypatch.setattr(module, "log_dict", lambda values, **_: logged.update(values))
    batch = {"labeled": {"mask": torch.zeros(1, 2, 2, dtype=torch.long)}}
    module._log_step(torch.tensor(1.0), {"x": torch.tensor(2.0)}, 0.125, batch, None)
    assert all(isinstance(value, torch.Tensor) for value in logged.values())
    assert logged["train/lambda_np"].item() == 0.125
    assert logged["train/lr"].item() == pytest.approx(0.3)
