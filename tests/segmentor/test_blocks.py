"""Checkpointed and compiled blocks, and cropped atrous kernels: same results, less memory or time."""

import copy
import pickle

import pytest
import torch
from torch import nn

from benchmarks.step_timing import LivingTensors
from mlpmatch_pl.perturbation import bypass
from mlpmatch_pl.segmentor import Segmentor
from mlpmatch_pl.segmentor.blocks import (
    Compiled,
    block_runner,
    eval_mode,
    frozen_batchnorm_statistics,
    run_block,
)
from mlpmatch_pl.segmentor.deeplabv3plus import AtrousConv2d, DeepLabV3Plus
from mlpmatch_pl.utils.errors import UserError


def make_segmentor(**options):
    torch.manual_seed(0)
    segmentor = Segmentor(4, backbone="test_resnet", decoder={"channels": 8}, **options).double().train()
    for module in segmentor.modules():  # timm initializes residual branches to zero, which would hide deactivation
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return segmentor


def run_forked(segmentor, deactivated):
    """Run plain, deactivated and strong passes with gradients, as a training step does."""
    x = torch.randint(0, 256, (2, 3, 33, 33), generator=torch.Generator().manual_seed(0))
    features = [*segmentor.encode_forked(x, deactivated), segmentor.encode(x.flip(3))]
    loss = torch.stack([segmentor.decode(part, (33, 33)).square().mean() for part in features]).sum()
    loss.backward()
    return loss.item()


def assert_same_state(one, other, **tolerance):
    """Compare gradients and running statistics."""
    for (name, first), second in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad, msg=name, **tolerance)
    for (name, first), second in zip(one.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(first, second, msg=name, **tolerance)


def test_checkpointed_blocks_give_the_same_gradients_and_statistics():
    plain, checkpointed = make_segmentor(), make_segmentor(activation_checkpointing=True)
    assert run_forked(plain, frozenset({2})) == run_forked(checkpointed, frozenset({2}))
    assert_same_state(plain, checkpointed, rtol=0, atol=0)
    norms = [norm for norm in checkpointed.modules() if isinstance(norm, nn.BatchNorm2d)]
    assert {norm.num_batches_tracked.item() for norm in norms} == {2, 3}  # 2 in the part that two passes share
    assert {norm.momentum for norm in norms} == {0.1}


def test_checkpointed_blocks_keep_less_memory():
    def memory(segmentor):
        with LivingTensors() as living:
            features = segmentor.encode(torch.rand(2, 3, 129, 129))
            assert features.levels[0].requires_grad
            return living.now

    assert memory(make_segmentor(activation_checkpointing=True)) < 0.8 * memory(make_segmentor())


def compiled_segmentor(checkpointed, backend):
    segmentor = make_segmentor()
    segmentor.encoder._training_runner = block_runner(True, checkpointed, backend)
    torch._dynamo.reset()
    return segmentor


@pytest.mark.parametrize(("checkpointed", "backend"), [(False, "aot_eager"), (True, "eager")])
def test_compiled_blocks_give_the_same_results(checkpointed, backend):
    plain, compiled = make_segmentor(), compiled_segmentor(checkpointed, backend)
    deactivated = frozenset({3})  # its projection has a BatchNorm, which runs either way
    assert run_forked(compiled, deactivated) == pytest.approx(run_forked(plain, deactivated), rel=1e-9)
    assert_same_state(plain, compiled, rtol=1e-6, atol=1e-9)


class CountingBackend:
    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def test_blocks_are_compiled_once_and_only_for_training():
    backend = CountingBackend()
    segmentor = compiled_segmentor(False, backend)
    with torch.no_grad():
        segmentor.eval()(torch.rand(1, 3, 49, 81))
    assert backend.graphs == 0
    segmentor.train()
    counts = []
    for block in (1, 3, 1, 3):
        run_forked(segmentor, frozenset({block}))
        counts.append(backend.graphs)
    assert counts == [5, 6, 6, 6]  # four blocks as they are, and two deactivated


def test_every_input_size_is_compiled():
    backend = CountingBackend()
    torch._dynamo.reset()
    run, block = Compiled(lambda block, x: block(x), backend), nn.Conv2d(1, 1, 1)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):  # other libraries raise it
        for size in range(2, 14):
            run(block, torch.rand(1, 1, size, size))
    assert backend.graphs == 12


def test_compiled_runners_can_be_copied_and_pickled():
    segmentor = make_segmentor(compile_blocks=True)
    assert list(segmentor.state_dict()) == list(make_segmentor().state_dict())
    runner = segmentor.encoder._training_runner
    assert callable(runner.run._compiled)  # torch.compile's result cannot be pickled
    for copied in (copy.deepcopy(segmentor).encoder._training_runner, pickle.loads(pickle.dumps(runner))):
        assert (copied.run.function, copied.bypass.function, copied.run.backend) == (run_block, bypass, "inductor")
        assert "_compiled" not in vars(copied.run)


def fail_inside(context, check):
    with context:
        check()
        raise RuntimeError("inside")


def test_frozen_statistics_are_updated_again_after_an_error():
    norm, x = nn.BatchNorm2d(2), torch.rand(4, 2, 3, 3)
    with pytest.raises(RuntimeError, match="inside"):
        fail_inside(frozen_batchnorm_statistics(norm), lambda: norm(x))
    assert torch.equal(norm.running_mean, torch.zeros(2))
    norm(x)
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 2, 3)))


def test_eval_mode_restores_the_mode_of_every_part():
    module, seen = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).train(), []
    module[1].eval()
    with pytest.raises(RuntimeError, match="inside"):
        fail_inside(eval_mode(module), lambda: seen.extend(part.training for part in module.modules()))
    assert seen == [False, False, False]
    assert [part.training for part in module.modules()] == [True, True, False]


@pytest.mark.parametrize("size", [(7, 9), (12, 13), (20, 5), (25, 25), (1, 1)])
def test_cropped_kernels_give_the_same_results(size):
    torch.manual_seed(0)
    cropped = AtrousConv2d(3, 4, dilation=12).double().train()
    whole = nn.Conv2d(3, 4, 3, padding=12, dilation=12, bias=False).double()
    whole.load_state_dict(cropped.state_dict())
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [cropped(inputs[0]), whole(inputs[1])]
    for output in outputs:
        (output * torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)).sum().backward()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cropped.weight.grad, whole.weight.grad, rtol=1e-12, atol=1e-12)
    assert torch.equal(cropped.eval()(x), whole(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "expected decoder.channels from 1 to 4096, but got 0"),
        ({"atrous_rates": []}, "expected decoder.atrous_rates as 1 to 16 numbers from 1 to 1024, but got 0"),
        (
            {"atrous_rates": [6, 2000]},
            r"expected decoder.atrous_rates as 1 to 16 numbers from 1 to 1024, but got 2: \[6, 2000\]",
        ),
    ],
)
def test_wrong_decoder_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        DeepLabV3Plus((8, 8), 3, **options)
