"""Compiled and checkpointed blocks, and atrous convolutions on small crops: the same result, faster or smaller."""

import copy
import pickle

import pytest
import torch
from helpers import TINY, compose_train
from torch import nn

from benchmarks.step_timing import LivingTensors
from mlpmatch_pl import MLPMatch
from mlpmatch_pl.engine.trainer import MODULE_OPTIONS
from mlpmatch_pl.methods.step import StepResult, step_values
from mlpmatch_pl.perturbation.network import bypass
from mlpmatch_pl.segmentor import Segmentor
from mlpmatch_pl.segmentor.blocks import Compiled, block_runner, frozen_batchnorm_statistics, run_block
from mlpmatch_pl.segmentor.deeplabv3plus import AtrousConv2d
from mlpmatch_pl.train import train


def segmentor_like(other=None, backbone="test_resnet", **options):
    torch.manual_seed(0)
    segmentor = Segmentor(4, backbone=backbone, decoder_channels=8, **options).double().train()
    for module in segmentor.modules():  # timm's residual branches begin as zero: deactivated or not would be the same
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    if other is not None:
        segmentor.load_state_dict(other.state_dict())
    return segmentor


def run_forked(segmentor, deactivated=frozenset({2}), size=65, images=2, frozen=False):
    """A plain, a deactivated and a strong pass with gradients, as in a training step."""
    x = torch.randint(0, 256, (images, 3, size, size), generator=torch.Generator().manual_seed(0))
    context = frozen_batchnorm_statistics(segmentor) if frozen else None
    plain, perturbed = segmentor.encode_forked(x, deactivated, context)
    strong = segmentor.encode(x[:2].flip(3))
    passes = [segmentor.decode(features, (size, size)).square().mean() for features in (plain, perturbed, strong)]
    loss = torch.stack(passes).sum()
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
    assert set(counted) == {2, 3}  # the shared prefix once for two passes, the rest in all
    assert {norm.momentum for norm in checkpointed.modules() if isinstance(norm, nn.BatchNorm2d)} == {0.1}


def test_checkpointed_blocks_keep_less():
    def kept(segmentor):
        with LivingTensors() as living:
            features = segmentor.encode(torch.rand(2, 3, 129, 129))
            assert features.levels[0].requires_grad
            return living.now

    assert kept(segmentor_like(activation_checkpointing=True)) < 0.8 * kept(segmentor_like())


def compiled_like(other, checkpointed=False, backend="aot_eager", **options):
    segmentor = segmentor_like(other, **options)
    segmentor.encoder._run_in_training = block_runner(True, checkpointed, backend)
    torch._dynamo.reset()
    return segmentor


@pytest.fixture
def always_compiled():
    """To run a pass uncompiled is an error, not a warning."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_blocks_give_the_same_whichever_is_deactivated(checkpointed, always_compiled):
    plain = segmentor_like()
    compiled = compiled_like(plain, checkpointed)
    losses = []
    for block in range(len(plain.encoder.blocks)):  # three of four have a projection, with a BatchNorm
        for segmentor in (plain, compiled):
            losses.append(run_forked(segmentor, frozenset({block})).item())
        assert losses[-1] == pytest.approx(losses[-2], rel=1e-9)
    assert len(set(losses[::2])) == len(plain.encoder.blocks)
    assert_same(plain, compiled, rtol=1e-6, atol=1e-9)


@pytest.mark.slow  # half a minute to compile
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_deep_encoder_with_many_sizes_is_compiled_throughout(checkpointed, always_compiled):
    plain = segmentor_like(backbone="resnet50s")  # eight kinds of blocks
    compiled = compiled_like(plain, checkpointed, backbone="resnet50s")
    for deactivated in (frozenset({3}), frozenset({13, 14})):  # 5 images, frozen statistics, and 2 in the strong pass
        losses = [run_forked(segmentor, deactivated, 33, 5, True).item() for segmentor in (plain, compiled)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert_same(plain, compiled, rtol=1e-5, atol=1e-8)


def test_more_graphs_than_torch_allows_are_compiled():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    run, block = Compiled(lambda block, x: block(x), backend), nn.Conv2d(1, 1, 1)
    for size in range(2, 22):
        run(block, torch.rand(1, 1, size, size))
    assert len(graphs) == 20 > torch._dynamo.config.recompile_limit


def test_compiled_blocks_are_compiled_once_and_only_for_training():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    segmentor = compiled_like(segmentor_like(), backend=backend)
    with torch.no_grad():
        segmentor.eval()(torch.rand(1, 3, 49, 81))
        assert not graphs
    segmentor.train()
    blocks = range(len(segmentor.encoder.blocks))
    for block in blocks:
        run_forked(segmentor, frozenset({block}))
    compiled = len(graphs)
    assert 0 < compiled <= 2 * len(blocks)  # each as it is and deactivated
    for block in blocks:
        run_forked(segmentor, frozenset({block}))
    assert len(graphs) == compiled


def test_compiled_blocks_keep_the_names_of_weights_and_are_copied_and_pickled():
    module = MLPMatch(4, backbone="test_resnet", decoder_channels=8, compile_blocks=True)
    plain = MLPMatch(4, backbone="test_resnet", decoder_channels=8)
    assert list(module.state_dict()) == list(plain.state_dict())
    runner = module.segmentor.encoder._run_in_training
    assert callable(runner.run._compiled)  # what torch.compile returns cannot be pickled
    for copied in (copy.deepcopy(module).segmentor.encoder._run_in_training, pickle.loads(pickle.dumps(runner))):
        assert (copied.run.function, copied.bypass.function, copied.run.backend) == (run_block, bypass, "inductor")
        assert "_compiled" not in vars(copied.run)


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
        module.set_length(steps=10, epochs=1)
        optimizer = module.configure_optimizers()["optimizer"]
        assert bool(optimizer.defaults["fused"]) is fused
        for _ in range(2):
            for parameter in module.parameters():
                parameter.grad = torch.full_like(parameter, 0.1)
            optimizer.step()
        updated.append(module.segmentor.decoder.classifier.weight.detach())
    torch.testing.assert_close(updated[0], updated[1])


def test_a_step_logs_tensors_of_its_device_alone():
    """Of numbers Lightning makes tensors on the device, and waits for each."""
    result, mask_BHW = StepResult({"x": torch.tensor(2.0)}, None), torch.zeros(1, 2, 2, dtype=torch.long)
    values = step_values(result, torch.tensor(1.0), 0.125, mask_BHW, 255, 0.95)
    assert all(isinstance(value, torch.Tensor) for value in values.values())
    assert values["lambda_np"].item() == 0.125


def test_cudnn_searches_for_crops_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # to have it back afterwards
    seen = {"training_step": [], "validation_step": [], "test_step": []}

    def recorded(own, flags):
        return lambda self, *batch: flags.append(torch.backends.cudnn.benchmark) or own(self, *batch)

    for name, flags in seen.items():
        monkeypatch.setattr(MLPMatch, name, recorded(getattr(MLPMatch, name), flags))
    train(compose_train(*TINY, "trainer.benchmark=true", "schedule.steps=10", output_dir=tmp_path / "run"))
    assert len(seen["training_step"]) >= 10
    assert all(seen["training_step"])
    assert len(seen["validation_step"]) >= 2  # between the epochs
    assert not any(seen["validation_step"] + seen["test_step"])
    assert seen["test_step"]
    assert torch.backends.cudnn.benchmark
