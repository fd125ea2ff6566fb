"""Optimizers by name, their parameter groups and learning rates."""

import re

import pytest
import timm.optim
import torch
from torch import nn

from mlpmatch_pl import UserError
from mlpmatch_pl.methods.optimizers import build_optimizer
from mlpmatch_pl.segmentor import Encoder


@pytest.mark.parametrize("fused", [None, True])
def test_sgd_equals_a_plain_loop_in_encoder_and_decoder(fused):
    encoder, decoder = nn.Linear(2, 2), nn.Linear(2, 2)
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        nn.init.constant_(parameter, 1.0)
    spec = {"name": "SGD", "momentum": 0.8, "weight_decay": 0.002, "fused": fused}
    optimizer = build_optimizer(spec, encoder, decoder, lr=0.01, lr_multi=5.0)
    assert optimizer.defaults["fused"] is fused
    for _ in range(2):
        for parameter in (*encoder.parameters(), *decoder.parameters()):
            parameter.grad = torch.full_like(parameter, 0.1)
        optimizer.step()
    expected = []
    for lr in (0.01, 0.05):
        value, velocity = 1.0, 0.0
        for _ in range(2):
            velocity = 0.8 * velocity + 0.1 + 0.002 * value
            value -= lr * velocity
        expected.append(value)
    assert [encoder.weight[0, 0].item(), decoder.bias[0].item()] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ("AdamW", torch.optim.AdamW),
        ({"name": "RMSprop", "alpha": 0.9}, torch.optim.RMSprop),
        ({"name": "lion", "weight_decay": 0.1}, timm.optim.Lion),
        ("adan", timm.optim.Adan),
    ],
)
def test_optimizers_of_torch_and_timm_train(spec, kind):
    encoder, decoder = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = build_optimizer(spec, encoder, decoder, lr=0.01)
    assert isinstance(optimizer, kind)
    before = encoder.weight.clone()
    decoder(encoder(torch.ones(1, 2))).sum().backward()
    optimizer.step()
    assert not torch.equal(encoder.weight, before)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("AdmW", "a class of torch.optim or an optimizer of timm, but got 'AdmW'. Did you mean AdamW"),
        ({"weight_decay": 0.1}, "expected optimizer.name as a class of torch.optim"),
        ({"name": "SGD", "momentm": 0.9}, "SGD refuses: SGD.__init__() got an unexpected keyword argument 'momentm'"),
        ({"name": "SGD", "momentum": -1}, "SGD refuses: Invalid momentum value: -1"),
        ("LBFGS", "LBFGS refuses: LBFGS doesn't support per-parameter options"),
    ],
)
def test_wrong_optimizers_are_refused(spec, message):
    with pytest.raises(UserError, match=re.escape(message)):
        build_optimizer(spec, nn.Linear(1, 1), nn.Linear(1, 1), lr=0.1)


@pytest.mark.parametrize("backbone", ["test_resnet", "mobilenetv2_035", "test_vit"])
def test_layer_decay_lowers_the_rate_from_layer_to_layer_and_covers_all_parameters(backbone):
    encoder, decoder = Encoder(backbone), nn.Linear(1, 1)
    *layers, last = build_optimizer("AdamW", encoder, decoder, 0.1, lr_multi=10, layer_decay=0.5).param_groups
    assert [layer["lr"] for layer in layers] == pytest.approx([0.1 * 0.5**depth for depth in range(len(layers))])
    assert last["lr"] == pytest.approx(1.0)
    trained = [parameter for layer in layers for parameter in layer["params"]]
    assert sorted(map(id, trained)) == sorted(map(id, encoder.parameters()))
    assert any(parameter is next(encoder.parameters()) for parameter in layers[-1]["params"])  # the stem
