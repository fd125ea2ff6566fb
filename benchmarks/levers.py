"""The gain of each optimization of the training step alone: `mlpmatch` with and without it, alternating in one process.

    python -m benchmarks.levers --seconds 200 --out benchmarks/results/levers_cpu.json
    python -m benchmarks.levers --levers compile_blocks     # on a CPU only on request: compiling takes minutes

Optimizations that are always on are removed (`without ...`: a ratio below 1 is what they gain), options are switched on
(a ratio above 1 is a gain). The ratio is the time of the plain step over that with the change, over all rounds; on a
busy CPU, read `cpu`, the ratio of processor time. `predicted` is the ratio of the convolutions' operations.
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.step import LAMBDA, SEED, THRESHOLD, Network, heaviest_step, own_blocks
from benchmarks.step_timing import (
    Contestant,
    alternate,
    gigaflop,
    parser,
    peak_mib,
    representative,
    row,
    shared_optimizer,
    start,
    write,
)
from mlpmatch_pl.methods.method import resolve_method, total_loss
from mlpmatch_pl.methods.official_step import OfficialStep
from mlpmatch_pl.methods.step import MultiLevelStep, WeakPass
from mlpmatch_pl.segmentor import Features
from mlpmatch_pl.segmentor.blocks import block_runner
from mlpmatch_pl.segmentor.deeplabv3plus import AtrousConv2d


class WithoutFork(MultiLevelStep):
    """The deactivated network runs in full."""

    network_pass = OfficialStep.network_pass

    def encode_forked(self, images_B3HW: Tensor, step: int) -> tuple[Features, dict[str, Features]]:
        return self.segmentor.encode(images_B3HW), {}


class WithThrownAway(MultiLevelStep):
    """Feature-perturbed predictions for the labeled images too."""

    def weak_pass(self, labeled_B3HW: Tensor, unlabeled_B3HW: Tensor, step: int) -> WeakPass:
        features, perturbed = self.encode_forked(torch.cat([labeled_B3HW, unlabeled_B3HW]), step)
        dropped = Features(self.feature_perturbations["fp"](features.levels, step))
        logits = self.segmentor.decode(Features.cat([features, dropped]), labeled_B3HW.shape[2:])
        x, u, _, fp = torch.split(logits, [len(labeled_B3HW), len(unlabeled_B3HW)] * 2)
        return WeakPass(x, u, {"fp": fp}, perturbed)


def contestant(
    network: Network, name: str, step_class: type[MultiLevelStep] = MultiLevelStep, *, partner: str = "batch",
    precision: str = "float32", change: Callable[[nn.Module], object] = lambda segmentor: None, fused: bool = False,
) -> Contestant:  # fmt: skip
    """Return a variant of the plain step with its own network."""
    method = resolve_method({"name": "mlpmatch", "partner": partner})
    segmentor = copy.deepcopy(network.segmentor)
    change(segmentor)
    step = step_class(segmentor, network.criterion, method, THRESHOLD, SEED)
    unlabeled = network.needed(method)

    def loss(number: int) -> Tensor:
        return total_loss(step(network.labeled, unlabeled, number).terms, method, LAMBDA)

    optimizer = shared_optimizer(segmentor, fused=fused or None)
    batch, numbers = (network.labeled, unlabeled), representative(partial(own_blocks, step))
    return Contestant(name, loss, segmentor, optimizer, precision, heaviest_step(step), batch, numbers)


def whole_kernels(segmentor: nn.Module) -> None:
    for layer in segmentor.modules():
        if isinstance(layer, AtrousConv2d):
            layer.__class__ = nn.Conv2d  # type: ignore[assignment]


def runs(**options: bool) -> Callable[[nn.Module], None]:
    def change(segmentor: nn.Module) -> None:
        segmentor.encoder._training_runner = block_runner(**{"compiled": False, "checkpointed": False, **options})

    return change


LEVERS: dict[str, Callable[[Network, str], Contestant]] = {
    "without forked forward": lambda network, name: contestant(network, name, WithoutFork),
    "without in-batch partner": lambda network, name: contestant(network, name, partner="same_image"),
    "with thrown-away predictions": lambda network, name: contestant(network, name, WithThrownAway),
    "without cropped kernels": lambda network, name: contestant(network, name, change=whole_kernels),
    "channels_last": lambda network, name: contestant(
        network, name, change=lambda segmentor: segmentor.to(memory_format=torch.channels_last)
    ),
    "fused_optimizer": lambda network, name: contestant(network, name, fused=True),
    "bfloat16": lambda network, name: contestant(network, name, precision="bfloat16"),
    "activation_checkpointing": lambda network, name: contestant(network, name, change=runs(checkpointed=True)),
    "compile_blocks": lambda network, name: contestant(network, name, change=runs(compiled=True)),
}

SAME_OPERATIONS = ("plain", "channels_last", "fused_optimizer", "bfloat16", "compile_blocks")  # as the plain step


def main() -> None:
    arguments = parse()
    device = start(arguments)
    network = Network(arguments, device, channels_last=False)
    contestants = [contestant(network, "plain"), *(LEVERS[name](network, name) for name in arguments.levers)]
    rounds, plain = alternate(contestants, device, arguments.seconds), gigaflop(contestants[0], device)
    lines = [
        {
            **row(each, contestants[0], 2 * arguments.batch),
            "peak_mib": round(peak_mib(each, device), 1),
            "predicted": 1.0 if each.name in SAME_OPERATIONS else round(plain / gigaflop(each, device), 3),
        }
        for each in contestants
    ]
    print(f"{rounds} rounds")
    for line in lines:
        print("{name:30} {ms:8.1f} ms {peak_mib:7.0f} MiB {ratio:6.2f} x   cpu {cpu_ratio:6.2f} x   predicted "
              "{predicted:6.2f} x".format(**line))  # fmt: skip
    write(arguments, {"rounds": rounds, "levers": lines})


def parse() -> argparse.Namespace:
    arguments = parser(__doc__, seconds=200)
    # Compiling takes minutes on a CPU.
    quick = [name for name in LEVERS if torch.cuda.is_available() or name != "compile_blocks"]
    arguments.add_argument("--levers", nargs="+", default=quick, choices=LEVERS)
    return arguments.parse_args()


if __name__ == "__main__":
    main()
