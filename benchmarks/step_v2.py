"""The cost of MLPMatch on top of UniMatch V2: training steps of a transformer with DPT, alternating in one process.

    python -m benchmarks.step_v2 --threads 1 --out benchmarks/results/step_v2_cpu.json
    python -m benchmarks.step_v2 --crop 518 --batch 16 --backbone vit_base_patch14_dinov2

`cost` is the time of a step relative to that of `unimatch_v2`, `cpu cost` the same in processor time, over all
rounds; on a busy CPU, read the latter. `mlpmatch_v2, two passes` runs the deactivated network in full instead of
forking. Weights are random, and the learning rate is 0.
"""

import torch
from torch import Tensor

from benchmarks.step import LAMBDA, SEED, own_blocks, random_batch
from benchmarks.step_timing import (
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
from mlpmatch_pl.methods.losses import build_criterion
from mlpmatch_pl.methods.method import resolve_method, total_loss
from mlpmatch_pl.methods.step import MultiLevelStep
from mlpmatch_pl.methods.teacher import Teacher
from mlpmatch_pl.segmentor import Features, Segmentor


class TwoPasses(MultiLevelStep):
    """The deactivated network runs in full."""

    def _encode(
        self, images_B3HW: Tensor, step: int, forks: dict, perturbed_images: slice
    ) -> tuple[Features, dict[str, Features]]:
        stages = self.segmentor.encoder.stages
        return self.segmentor.encode(images_B3HW), {
            name: self.segmentor.encode(images_B3HW[perturbed_images], perturbation.draw(stages, step))
            for name, perturbation in forks.items()
        }


ROWS = {
    "unimatch_v2": ("unimatch_v2", MultiLevelStep),
    "mlpmatch_v2": ("mlpmatch_v2", MultiLevelStep),
    "mlpmatch_v2_stream": ("mlpmatch_v2_stream", MultiLevelStep),
    "mlpmatch_v2, two passes": ("mlpmatch_v2", TwoPasses),
}


def main() -> None:
    options = parser(__doc__, seconds=1)
    options.set_defaults(backbone="vit_small_patch14_dinov2", crop=518 if torch.cuda.is_available() else 98,
                         batch=16 if torch.cuda.is_available() else 4)  # fmt: skip
    options.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    arguments = options.parse_args()
    device = start(arguments)
    torch.manual_seed(0)
    segmentor = Segmentor(arguments.classes, arguments.backbone, decoder="dpt").to(device).train()
    optimizer, criterion = shared_optimizer(segmentor), build_criterion(arguments.criterion, arguments.classes)
    labeled, unlabeled = random_batch(arguments, device, twice=False)
    teacher = Teacher(segmentor, decay=0.996)

    def contestant(name: str) -> Contestant:
        method, step_class = resolve_method(ROWS[name][0]), ROWS[name][1]
        step = step_class(segmentor, criterion, method, 0.0, SEED, teacher)

        def loss(number: int) -> Tensor:
            lambda_np = LAMBDA if method.lambda_max else 0.0
            return total_loss(step(labeled, unlabeled, number).terms, method, lambda_np)

        numbers = representative(lambda number: own_blocks(step, number))
        return Contestant(
            name, loss, segmentor, optimizer, arguments.precision, numbers[0], (labeled, unlabeled), numbers
        )

    contestants = [contestant(name) for name in ROWS]
    rounds, table = alternate(contestants, device, arguments.seconds), []
    for each in contestants:
        figures = row(each, contestants[0], 2 * arguments.batch)
        costs = {"cost": round(1 / figures.pop("ratio"), 3), "cpu_cost": round(1 / figures.pop("cpu_ratio"), 3)}
        table.append({**figures, **costs, "peak_mib": round(peak_mib(each, device))})
        print("{name:25} {ms:8.1f} ms  cost {cost:5.2f}  cpu cost {cpu_cost:5.2f}  {peak_mib} MiB".format(**table[-1]))
    write(arguments, {"rounds": rounds, "steps": table})


if __name__ == "__main__":
    main()
