"""Time and memory of a training step, compared with a plain step as the authors run it, and the cost of perturbations.

    python -m benchmarks.step --out benchmarks/results/step_cpu.json         # about 5 minutes
    python -m benchmarks.step --crop 801 --batch 2 --classes 19 --criterion ohem    # on a GPU, as for Cityscapes
    python -m benchmarks.step --backbone test_resnet --crop 65 --seconds 0   # to check that it runs

Two tables. **Against the reference**: `reference_step.py`, which repeats the authors' passes one by one in float32, and
this package's step for the same method, at the same precision and (on a GPU) in bfloat16 and channels-last; `floor` is
the forward and backward pass of the same images through encoder and decoder alone. First, the losses of the reference
and `mlpmatch_official` are compared for the same draws (with `--criterion ohem`, the reference uses this package's loss
for labeled images). **Perturbations**: every method, and MLPMatch with every sampler, relative to supervised training
on as many images.

The contestants alternate in one process and share weights and a batch on the device. A round is one step of each;
sixteen rounds cover representative draws, because the deactivated block determines how much of the encoder is shared.
A ratio compares the sums over all rounds. Peak memory is that of one step, with the draws that need most.
"""

import argparse
import copy
import random
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.reference_step import ReferenceStep, reference_batch
from benchmarks.step_timing import (
    STEPS,
    Contestant,
    alternate,
    parser,
    peak_mib,
    representative,
    row,
    shared_optimizer,
    start,
    write,
)
from mlpmatch_pl.methods.build import build_step
from mlpmatch_pl.methods.losses import build_criterion
from mlpmatch_pl.methods.method import Method, resolve_method, total_loss
from mlpmatch_pl.methods.official_step import OfficialStep
from mlpmatch_pl.methods.step import MultiLevelStep
from mlpmatch_pl.perturbation.network import SAMPLERS
from mlpmatch_pl.segmentor import Features, Segmentor

THRESHOLD, SEED, LAMBDA = 0.95, 0, 0.125
COSTS = {
    "supervised": "supervised",
    "fixmatch": "fixmatch",
    "unimatch": "unimatch",
    **{
        f"mlpmatch, {sampler}": {"name": "mlpmatch", "network_perturbation": {"sampler": sampler}}
        for sampler in SAMPLERS
        if sampler != "single_branch"  # of transformers
    },
}


def main() -> None:
    options = parser(__doc__, seconds=240)
    options.add_argument("--only", nargs="+", metavar="ROW", help="rows to measure (default: all)")
    arguments = options.parse_args()
    device = start(arguments)
    network = Network(arguments, device, channels_last=False)
    same_loss = check_same_loss(network)
    print(f"reference and mlpmatch_official: the same loss (relative difference {same_loss:.1e})", flush=True)
    against = chosen(against_reference(network, arguments, device), arguments.only)
    costs = chosen(perturbations(network), arguments.only)
    rounds, images = alternate([*against, *costs], device, arguments.seconds), 2 * arguments.batch
    result = {
        "rounds": rounds,
        "same_loss_relative_difference": same_loss,
        "against_reference": [figures(each, base_of(each, against), images, device) for each in against],
        "perturbations": [figures(each, costs[0], images, device) for each in costs],
    }
    for table in [table for table in ("against_reference", "perturbations") if result[table]]:
        print(f"\n{table.replace('_', ' ')}, {rounds} rounds")
        for line in result[table]:
            print("{name:30} {precision:9} {ms:8.1f} ms (min {ms_min:8.1f}) {images_per_second:7.2f} img/s "
                  "{peak_mib:7.0f} MiB {ratio:6.2f} x".format(**line), flush=True)  # fmt: skip
    write(arguments, result)


class Network:
    """A network, its optimizer and a batch, shared by contestants."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device, channels_last: bool) -> None:
        torch.manual_seed(0)
        segmentor = Segmentor(
            arguments.classes, arguments.backbone, decoder={"channels": arguments.decoder_channels}
        ).to(device)
        self.segmentor = segmentor.to(memory_format=torch.channels_last) if channels_last else segmentor
        self.optimizer = shared_optimizer(self.segmentor.train())
        self.criterion = build_criterion(arguments.criterion, arguments.classes)
        self.labeled_loss = {} if arguments.criterion == "ce" else {"labeled_loss": self.criterion}  # for the reference
        self.labeled, self.unlabeled = random_batch(arguments, device, twice=False)
        self.twice, _ = random_batch(arguments, device, twice=True)

    def contestant(self, name: str, spec: str | dict, precision: str = "float32") -> Contestant:
        """Return this package's step for a method."""
        method = resolve_method(spec)
        step = build_step(self.segmentor, self.criterion, method, THRESHOLD, SEED)
        labeled, unlabeled = (self.labeled, self.needed(method)) if method.uses_unlabeled else (self.twice, {})

        def loss(number: int) -> Tensor:
            return total_loss(step(labeled, unlabeled, number).terms, method, LAMBDA)

        batch, heaviest, numbers = (labeled, unlabeled), heaviest_step(step), representative(partial(own_blocks, step))
        return Contestant(name, loss, self.segmentor, self.optimizer, precision, heaviest, batch, numbers)

    def needed(self, method: Method) -> dict:
        """Return the unlabeled batch with the keys that the data module provides for a method."""
        views = len(method.strong_weights)
        batch = {
            **self.unlabeled,
            "strong": self.unlabeled["strong"][:, :views],
            "boxes": self.unlabeled["boxes"][:, :views],
        }
        return batch if method.partner == "same_image" else {key: batch[key] for key in batch if key != "partner"}

    def reference(self, name: str, method: str) -> Contestant:
        """Return the authors' step."""
        step = ReferenceStep(self.segmentor, method, THRESHOLD, **self.labeled_loss)
        rng = random.Random(SEED)
        drawn = [step.draw_stages(rng) for _ in range(64 * STEPS)]
        batch = reference_batch(self.labeled, self.unlabeled, self.segmentor)

        def loss(number: int) -> Tensor:
            step.draw_blocks = lambda: drawn[number] if number >= 0 else frozenset()
            return step.total(step(batch), LAMBDA)

        numbers = representative(lambda number: -len(drawn[number]))
        return Contestant(name, loss, self.segmentor, self.optimizer, heaviest=-1, batch=batch, numbers=numbers)

    def floor(self, name: str, precision: str = "float32") -> Contestant:
        """Return the forward and backward pass of the images of MLPMatch's step alone."""
        method = resolve_method("mlpmatch")
        step = build_step(self.segmentor, self.criterion, method, THRESHOLD, SEED)
        images = torch.cat([self.labeled["image"], self.unlabeled["weak"]])
        strong, own = self.unlabeled["strong"].transpose(0, 1).flatten(0, 1), len(self.labeled["image"])

        def loss(number: int) -> Tensor:
            plain, perturbed = step.encode_forked(images, number)
            passes = [Features.cat([plain, plain[own:]]), *perturbed.values(), self.segmentor.encode(strong)]
            return torch.stack([self.segmentor.decoder(features).mean() for features in passes]).sum()

        numbers = representative(partial(own_blocks, step))
        return Contestant(name, loss, self.segmentor, None, precision, heaviest_step(step), (images, strong), numbers)


def own_blocks(step: Callable, number: int) -> int:
    """Return how many blocks the perturbed pass of a step does not share with the plain pass."""
    perturbations = getattr(step, "network_perturbations", {})
    if not perturbations:
        return 0
    drawn, blocks = perturbations["np"].draw(step.segmentor.encoder.stages, number), len(step.segmentor.encoder.blocks)
    shared = 0 if isinstance(step, OfficialStep) else min(drawn, default=blocks)
    return max(blocks - shared - len(drawn), 0)


def heaviest_step(step: Callable) -> int:
    """Return the step, among the first 64, whose perturbed pass shares the fewest blocks."""
    return max(range(64), key=partial(own_blocks, step))


def against_reference(network: Network, arguments: argparse.Namespace, device: torch.device) -> list[Contestant]:
    """Return references, steps of this package and floors; on a GPU also with the settings of `trainer=gpu`."""
    contestants = []
    for method in ("mlpmatch", "unimatch"):
        contestants += [network.reference(f"reference {method}", method), network.contestant(method, method)]
    contestants += [network.contestant("mlpmatch_official", "mlpmatch_official"), network.floor("floor mlpmatch")]
    if device.type == "cuda":
        fast = Network(arguments, device, channels_last=True)
        for method in ("mlpmatch", "unimatch"):
            contestants.append(fast.contestant(f"{method}, channels-last", method, "bfloat16"))
        contestants.append(fast.floor("floor mlpmatch, channels-last", "bfloat16"))
    return contestants


def perturbations(network: Network) -> list[Contestant]:
    """Return every method, and MLPMatch with every sampler."""
    return [network.contestant(name, spec) for name, spec in COSTS.items()]


def chosen(contestants: list[Contestant], names: list[str] | None) -> list[Contestant]:
    """Return the contestants with these names; all if None."""
    return [each for each in contestants if names is None or each.name in names]


def base_of(contestant: Contestant, contestants: list[Contestant]) -> Contestant:
    """Return the reference of a contestant's method."""
    method = "unimatch" if "unimatch" in contestant.name else "mlpmatch"
    return next(each for each in contestants if each.name == f"reference {method}")


def figures(contestant: Contestant, base: Contestant, images: int, device: torch.device) -> dict:
    """Return a row of the result."""
    return {**row(contestant, base, images), "peak_mib": round(peak_mib(contestant, device), 1)}


def check_same_loss(network: Network, steps: int = 3) -> float:
    """Compare the reference and `mlpmatch_official` for the same draws; returns the largest relative difference.

    Raises:
        SystemExit: If they differ by more than rounding errors.
    """
    method = resolve_method("mlpmatch_official")
    step = build_step(network.segmentor, network.criterion, method, 0.0, SEED)
    assert isinstance(step, MultiLevelStep)
    worst = 0.0
    for number in range(steps):
        twin = copy.deepcopy(network.segmentor)  # the partners' labels depend on running statistics, which steps update
        reference = reference_with_draws_of(step, twin, number, network.labeled_loss)
        batch = reference_batch(network.labeled, network.unlabeled, twin)
        # Without TF32, which alone would make the two differ by more.
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            own = total_loss(step(network.labeled, network.unlabeled, number).terms, method, LAMBDA).item()
            theirs = reference.total(reference(batch), LAMBDA).item()
        worst = max(worst, abs(own - theirs) / abs(theirs))
    if worst > 1e-4:
        raise SystemExit(f"expected the same loss from the reference and mlpmatch_official, but they differ by {worst}")
    return worst


def reference_with_draws_of(
    step: MultiLevelStep, segmentor: Segmentor, number: int, labeled_loss: dict
) -> ReferenceStep:
    """Return the reference with the deactivated blocks and dropped channels of a step of this package."""
    blocks = step.network_perturbations["np"].draw(segmentor.encoder.stages, number)
    drop = partial(step.feature_perturbations["fp"], step=number)
    return ReferenceStep(segmentor, "mlpmatch", step.threshold, lambda: blocks, drop, **labeled_loss)


def random_batch(arguments: argparse.Namespace, device: torch.device, twice: bool) -> tuple[dict, dict]:
    """Return a batch of noise with two strong views; `twice` doubles the labeled images, as in supervised training."""
    size, crop, generator = arguments.batch, arguments.crop, torch.Generator().manual_seed(0)

    def images(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)

    def views() -> dict:
        valid = torch.ones(size, crop, crop, dtype=torch.bool, device=device)
        return {"weak": images(size, 3, crop, crop), "strong": images(size, 2, 3, crop, crop), "valid": valid}

    labeled = size * (1 + twice)
    mask = torch.randint(0, arguments.classes, (labeled, crop, crop), dtype=torch.uint8, generator=generator)
    box = torch.tensor([crop // 4, crop // 4, crop // 2, crop // 2], device=device).expand(size, 2, 4)
    unlabeled = {**views(), "boxes": box, "partner": views()}
    return {"image": images(labeled, 3, crop, crop), "mask": mask.to(device)}, unlabeled


if __name__ == "__main__":
    main()
