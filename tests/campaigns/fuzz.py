"""Random and broken input, thousands of times: a clean result or one clear sentence, never another error, never a hang.

    python tests/campaigns/fuzz.py --minutes 30 --out fuzz.json
    python tests/campaigns/fuzz.py --minutes 2 --only configs --seed 7

An area is a hypothesis strategy and a function of what it draws; test_fuzz.py runs the same areas with fewer inputs. A
failure is printed with the smallest input that shows it, and its area continues with another seed.
"""

import argparse
import io
import json
import logging
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import chdir, contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_module
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from PIL import Image

from mlpmatch_pl.commands.cli import _message
from mlpmatch_pl.commands.predict.outputs import KINDS
from mlpmatch_pl.commands.report.runs import Problem, read_run
from mlpmatch_pl.commands.train import _build
from mlpmatch_pl.data.cache import fill_cache, with_cache
from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.data.datasets.folder import folder
from mlpmatch_pl.data.datasets.shapes import shapes
from mlpmatch_pl.data.splits import choose
from mlpmatch_pl.data.validation import validate_dataset
from mlpmatch_pl.engine.build import read_config
from mlpmatch_pl.evaluate import evaluate
from mlpmatch_pl.export import export
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.predict import predict
from mlpmatch_pl.predictor import Predictor, load
from mlpmatch_pl.utils.errors import UserError

SECONDS = 30  # after which an input counts as a hang
TINY = (
    "dataset.train=8",
    "dataset.val=2",
    "dataset.test=2",
    "dataset.labeled=4",
    "dataset.size=33",
    "loader.crop_size=33",
    "loader.batch_size=2",
    "loader.eval_batch_size=1",
    "loader.num_workers=0",
    "decoder.channels=8",
    "schedule.steps=2",
)
SUFFIXES = ("png", "jpg", "bmp", "tif", "webp")
MEMORY = 8 * 2**30
CLEAN, CLEAR = "clean results", "clear errors"


@dataclass(frozen=True)
class Area:
    """What is drawn, and what is done with it; the function returns or raises UserError, and nothing else."""

    strategy: st.SearchStrategy[Any]
    try_it: Callable[[Any], None]


@contextmanager
def deadline(seconds: int):
    def stop(*_):
        raise TimeoutError(f"still running after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # again, as an exception in a finalizer or callback is lost
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(area: Area, drawn: Any) -> str:
    """Return what became of an input; anything but a result or a sentence is raised."""
    with deadline(SECONDS):
        try:
            area.try_it(drawn)
        except UserError as error:
            sentence = str(error)
        else:
            return CLEAN
    assert 10 < len(sentence) < 2000, f"no sentence: {sentence!r}"
    return CLEAR


# --- configurations -----------------------------------------------------------------------------------------------


def leaves(node: Any, prefix: str = ""):
    for key, value in node.items_ex(resolve=False) if hasattr(node, "items_ex") else ():
        yield f"{prefix}{key}", value
        yield from leaves(value, f"{prefix}{key}.")


@cache
def config_keys() -> dict[str, Any]:
    """Return every key with its value."""

    with initialize_config_module("mlpmatch_pl.conf", version_base="1.3"):
        cfg = compose("train", ["callbacks=inspect", "logger=csv", "output_dir=x"])
        folder_cfg = compose("train", ["dataset=folder", "output_dir=x"])
    extra = [
        "loader.foo",
        "method.network_perturbation.p",
        "method.network_perturbation.k",
        "trainer.max_epochs",
        "objective.criterion.class_weights",
        "objective.criterion.min_kept",
        "objective.criterion.threshold",
        "objective.criterion.dice_weight",
        "trainer.limit_val_batches",
        "trainer.overfit_batches",
    ]
    found = {**dict(leaves(folder_cfg)), **dict(leaves(cfg)), **dict.fromkeys(extra, 1)}
    return {key: found[key] for key in sorted(found) if key != "output_dir"}


SCALARS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([10**6, 2**31, 2**63, -(2**40), 10**30]),
    st.floats(width=32),
    st.sampled_from([0.0, 1e-30, 1e30, 0.5, 1.5]),
    st.booleans(),
    st.none(),
    st.text(max_size=6),
    st.sampled_from(
        [
            "ce",
            "ohem",
            "dice",
            "auto",
            "1/8",
            "1/0",
            "0/1",
            "9/8",
            "cpu",
            "fork",
            "skip",
            "single_stage",
            "n_blocks",
            "same_image",
            "official",
            "off",
            "16-mixed",
            "bf16-mixed",
            "resnet18",
            "data",
            "null",
            "mlpmatch_pl.data.datasets.folder.folder",
            "os.getcwd",
            "math.pi",
            "${seed}",
            "${nothing}",
            "???",
        ]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text("abk", max_size=3), inner)),
    max_leaves=5,
)
FLOATS = st.one_of(st.floats(-0.5, 3, width=32), st.sampled_from([0.0, 1.0, 1e-30, 1e30, -1.0, 100.0]))
INTEGERS = st.one_of(st.integers(-1, 70), st.sampled_from([100, 255, 1000, 10**6, 2**31, 2**63, 10**30]))


def changes(keys: dict[str, Any], fitting: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Draw keys with values: two thirds of them fitting ones, or of the type of the key's value."""

    def value_of(key: str) -> st.SearchStrategy[tuple[str, Any]]:
        default = keys[key]
        kind = type(default[0] if isinstance(default, list | ListConfig) and default else default)
        alike = {bool: st.booleans(), int: INTEGERS, float: FLOATS}.get(kind, SCALARS)
        if isinstance(default, list | ListConfig):
            alike = st.lists(alike, min_size=max(len(default) - 1, 0), max_size=len(default) + 1)
        alike = fitting.get(key, alike)
        return st.tuples(st.just(key), st.one_of(alike, alike, VALUES))

    pairs = st.sampled_from([*keys]).flatmap(value_of)
    return st.lists(pairs, min_size=1, max_size=3).map(dict)


def deleted(keys: dict[str, Any]) -> st.SearchStrategy[list[str]]:
    return st.one_of(*[st.just([])] * 3, st.sampled_from([*keys]).map(lambda key: [key]))


METHODS = ("mlpmatch", "mlpmatch_official", "unimatch", "fixmatch", "supervised")


@cache
def composed(method: str) -> Any:
    with initialize_config_module("mlpmatch_pl.conf", version_base="1.3"):
        return compose("train", [*TINY, "callbacks=inspect", f"method={method}", "output_dir=x"])


def change(cfg: DictConfig, changes: dict[str, Any], deleted: list[str]) -> None:
    with open_dict(cfg):
        for key, value in changes.items():
            OmegaConf.update(cfg, key, value)
        for parent, _, name in (key.rpartition(".") for key in deleted):
            node = OmegaConf.select(cfg, parent) if parent else cfg
            if isinstance(node, DictConfig):
                node.pop(name, None)


@contextmanager
def translate_errors(command: str):
    """Raise what the command would print in a line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (sentence := _message(error, command)) is None:
            raise
        raise UserError(sentence) from error


def try_config(drawn: tuple[str, dict[str, Any], list[str]]) -> None:
    method, changes, deleted = drawn
    cfg = deepcopy(composed(method))
    with tempfile.TemporaryDirectory() as place:
        try:
            cfg.output_dir = place
            with translate_errors("train"):
                change(cfg, changes, deleted)
                _build(read_config(cfg), Path(place))
        finally:
            assert not os.listdir(place), f"something was written before it was refused: {os.listdir(place)}"


# --- commands that take a checkpoint -------------------------------------------------------------------------------

COMMANDS = {
    "evaluate": (
        evaluate,
        [
            "dataset=shapes",
            "dataset.labeled=2",
            "dataset.test=2",
            "dataset.train=4",
            "dataset.val=2",
            "dataset.size=40",
        ],
    ),
    "predict": (predict, []),
    "export": (export, ["format=safetensors"]),  # the others take seconds
}
FITTING = {
    "batch_size": INTEGERS,
    "device": st.sampled_from(["cpu", "auto"]),
    "evaluation.absent": st.sampled_from(["exclude", "zero", None]),
    "inference.mode": st.sampled_from(["whole", "slide"]),
    "inference.scales": st.one_of(FLOATS, st.lists(FLOATS, max_size=2)),
    "inference.stride": st.integers(1, 40),
    "inference.window": INTEGERS,
    "input_dtype": st.sampled_from(["uint8", "float32"]),
    "num_workers": INTEGERS,
    "part": st.sampled_from(["val", "test"]),
    "returns": st.sampled_from(["logits", "probabilities"]),
    "save": st.lists(st.sampled_from(KINDS), max_size=3),
}
FIXED = ("checkpoint", "input", "output", "format")  # paths are for the area paths


@cache
def command_config(command: str) -> DictConfig:
    with initialize_config_module("mlpmatch_pl.conf", version_base="1.3"):
        return compose(
            command, [*COMMANDS[command][1], "checkpoint=x", "output=x", *["input=x"] * (command == "predict")]
        )


@cache
def command_keys(command: str) -> dict[str, Any]:
    found = dict(leaves(command_config(command)))
    unread = {"foo": 1} if command == "export" else {"foo": 1, "inference.foo": 1}
    own = {key: found[key] for key in found if key not in FIXED and not key.startswith(("loader", "objective"))}
    return dict(sorted((own | unread).items()))


def try_command(drawn: tuple[str, dict[str, Any], list[str], dict[str, Any]]) -> None:
    command, changes, deleted, paths = drawn
    cfg = deepcopy(command_config(command))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "best.ckpt").write_bytes(checkpoint(6))
        write_folder(place / "data", count=2)
        before = sorted(place.rglob("*"))
        own = {
            "checkpoint": "best.ckpt",
            "output": "out.safetensors" if command == "export" else "out",
            "input": "data",
        }
        refused = True
        try:
            with translate_errors(command), chdir(place), redirect_stdout(io.StringIO()):
                change(cfg, {key: value for key, value in (own | paths).items() if key in cfg} | changes, deleted)
                COMMANDS[command][0](cfg)
            refused = False
        finally:
            assert (sorted(place.rglob("*")) == before) == refused, "written although refused, or nothing was written"


# --- files ---------------------------------------------------------------------------------------------------------


def write_folder(place: Path, count: int = 6, suffix: str = "png") -> Path:
    for index in range(count):
        rng = np.random.default_rng(index)
        for kind, pixels in (("images", rng.integers(0, 256, (20, 24, 3))), ("masks", rng.integers(0, 2, (20, 24)))):
            (place / kind).mkdir(parents=True, exist_ok=True)
            name = f"{index}.{suffix if kind == 'images' else 'png'}"
            Image.fromarray(pixels.astype(np.uint8)).save(place / kind / name)
    return place


def broken(content: bytes, how: tuple[str, list[tuple[float, int]]]) -> bytes:
    kind, places = how
    if kind == "cut":
        return content[: int(len(content) * places[0][0])]
    if kind == "noise":
        return bytes(value for _, value in places)
    changed = bytearray(content)
    for place, value in places:
        changed[min(int(place * len(changed)), len(changed) - 1)] ^= value
    return bytes(changed)


HOW = st.tuples(
    st.sampled_from(["flip", "flip", "cut", "noise"]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=6),
)


def try_file(drawn: tuple[str, str, Any]) -> None:
    kind, suffix, how = drawn
    with tempfile.TemporaryDirectory() as place:
        root = write_folder(Path(place), suffix=suffix)
        path = root / kind / ("0.png" if kind == "masks" else f"0.{suffix}")
        path.write_bytes(broken(path.read_bytes(), how))
        validate_dataset(folder(str(root), ["a", "b"]), 33)


LINES = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogateescape")),
    st.lists(
        st.sampled_from(
            [
                "images/0.png",
                "images/1.png\tmasks/1.png",
                "images/2.png masks/2.png",
                "",
                " ",
                "0",
                "\ufeff",
                "../../etc/passwd",
                "/etc/passwd",
                "images/../images/3.png",
                "images",
                ".",
                "image,mask",
                "images/4.png,masks/4.png",
                "images/5.png\r",
                '"images/0.png"',
                "a\tb\tc",
                "\x00",
                "~",
                "image",
            ]
        ),
        max_size=6,
    ).flatmap(lambda lines: st.sampled_from(["\n", "\r\n", "\r"]).map(lambda end: end.join(lines).encode())),
)


def try_list(drawn: tuple[bytes, str, str]) -> None:
    content, key, name = drawn
    with tempfile.TemporaryDirectory() as place:
        root = write_folder(Path(place))
        (root / name).write_bytes(content)
        data = folder(str(root), ["a", "b"], **{key: name})
        validate_dataset(data, 33)


def try_choice(drawn: tuple[int, Any]) -> None:
    count, spec = drawn
    choose([str(index) for index in range(count)], spec, seed=0)


def try_mask(drawn: tuple[int, list[int], Any, int]) -> None:
    classes, values, mapping, ignore = drawn
    with tempfile.TemporaryDirectory() as place:
        root = write_folder(Path(place))
        for index in range(6):
            pixels = np.resize(np.array(values), (20, 24))
            Image.fromarray(pixels.astype(np.uint16 if max(values) > 255 else np.uint8)).save(
                root / f"masks/{index}.png"
            )
        names = [f"class {index}" for index in range(classes)]
        validate_dataset(folder(str(root), names, mask_values=mapping, ignore_index=ignore), 33)


# A name that a file system takes.
NAMES = st.text(st.characters(exclude_characters="/\x00", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..") and len(name.encode()) < 100
)


def try_path(drawn: tuple[str, str, str]) -> None:
    top, below, stem = drawn
    with tempfile.TemporaryDirectory() as place:
        root = write_folder(Path(place) / top)
        for kind in ("images", "masks"):
            (root / kind / below).mkdir()
            (root / kind / "0.png").rename(root / kind / below / f"{stem}.png")
        data = folder(str(root), ["a", "b"])
        validate_dataset(data, 33)
        hidden = below.startswith((".", "__MACOSX")) or stem.startswith(".")
        assert len(data.train) + len(data.val) == 6 - hidden


# --- sizes, checkpoints, caches, run folders --------------------------------------------------------------------------


class OneSize:
    def __init__(self, height: int, width: int) -> None:
        self.shape = (height, width)

    def __len__(self) -> int:
        return 4

    def name(self, index: int) -> str:
        return f"train_{index:04}"

    def image(self, index: int) -> np.ndarray:
        return np.full((*self.shape, 3), 40 * index, np.uint8)

    def mask(self, index: int) -> np.ndarray:
        return np.full(self.shape, index % 2, np.uint8)


@cache
def network(num_classes: int = 3) -> Predictor:
    torch.manual_seed(0)
    return Predictor(MLPMatch(num_classes, backbone="test_resnet", decoder={"channels": 8}))


def try_size(drawn: tuple[int, int, int]) -> None:
    height, width, crop = drawn
    source = OneSize(height, width)
    data = shapes(labeled=2, train=4, val=1, test=1)
    data = type(data)(**{**vars(data), "train": source, "val": source, "test": None})
    datamodule = SemiSupervisedDataModule(data, crop_size=crop, batch_size=2, num_workers=0)
    validate_dataset(data, crop)
    batch = next(iter(datamodule.train_dataloader()))[0]
    assert batch["unlabeled"]["strong"].shape == (2, 2, 3, crop, crop)
    assert next(iter(datamodule.val_dataloader()))["image"].shape == (1, 3, height, width)
    assert network().predict(source.image(1)).shape == (height, width)


@cache
def checkpoint(num_classes: int = 3) -> bytes:
    module, file = network(num_classes).module, io.BytesIO()
    content = {"global_step": 1, "hyper_parameters": dict(module.hparams), "state_dict": module.state_dict()}
    torch.save(content, file)
    return file.getvalue()


def try_checkpoint(drawn: Any) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "best.ckpt"
        if isinstance(drawn, dict):
            content = torch.load(io.BytesIO(checkpoint()), weights_only=True)
            content["hyper_parameters"] |= drawn
            torch.save(content, path)
        else:
            path.write_bytes(broken(checkpoint(), drawn))
        label = load(path, device="cpu").predict(np.zeros((34, 40, 3), np.uint8))
        assert label.shape == (34, 40)


def try_cache(drawn: Any) -> None:
    with tempfile.TemporaryDirectory() as place:
        data = folder(str(write_folder(Path(place) / "data")), ["a", "b"])
        plain = [data.train.image(index) for index in range(len(data.train))]
        fill_cache(data, Path(place) / "cache")
        for path in [path for path in (Path(place) / "cache").rglob("*") if path.is_file()]:
            path.write_bytes(broken(path.read_bytes(), drawn))
        cached = with_cache(data, Path(place) / "cache")
        for index, image in enumerate(plain):
            assert cached.train.image(index).shape == image.shape


def try_run_folder(drawn: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as place:
        for name, content in drawn.items():
            (Path(place) / name).write_bytes(content)
        problems: list[Problem] = []
        if read_run(Path(place), problems) is None:
            raise UserError(problems[0].reason)


GOOD = {
    "config.yaml": b"seed: 0\nmethod: {name: mlpmatch}\ndataset: {_target_: mlpmatch_pl.data.datasets.shapes.shapes}\n",
    "splits.json": b'{"labeled": {"split": "1/8", "count": 3, "sha256": "0"}}',
    "metrics.csv": b"epoch,step,train/loss,val/miou\n0,0,1.5,\n0,1,,0.5\n",
    "metrics.json": b'{"steps": 2, "test": {"test/miou": 0.5}, "best": {"val/miou": 0.5}}',
}
HPARAMS = (
    "num_classes",
    "method",
    "backbone",
    "in_chans",
    "output_stride",
    "decoder",
    "mean",
    "std",
    "criterion",
    "class_names",
    "palette",
    "bit_depth",
    "pretrained",
    "seed",
    "_instantiator",
)
ANY_BYTES = st.one_of(st.binary(max_size=80), st.text(max_size=80).map(lambda text: text.encode("utf-8", "ignore")))


AREAS = {
    "configs": Area(
        st.tuples(
            st.sampled_from(METHODS),
            st.deferred(lambda: changes(config_keys(), {})),
            st.deferred(lambda: deleted(config_keys())),
        ),
        try_config,
    ),
    "commands": Area(
        st.sampled_from([*COMMANDS]).flatmap(
            lambda command: st.tuples(
                st.just(command),
                changes(command_keys(command), FITTING),
                deleted(command_keys(command)),
                st.one_of(*[st.just({})] * 3, st.dictionaries(st.sampled_from(FIXED[:3]), SCALARS, max_size=1)),
            )
        ),
        try_command,
    ),
    "files": Area(st.tuples(st.sampled_from(["images", "masks"]), st.sampled_from(SUFFIXES), HOW), try_file),
    "lists": Area(
        st.tuples(
            LINES,
            st.sampled_from(["labeled", "unlabeled", "val", "test", "train"]),
            st.sampled_from(["list.txt", "list.csv"]),
        ),
        try_list,
    ),
    "choices": Area(st.tuples(st.integers(0, 40), st.one_of(SCALARS, st.from_regex(r"\d{1,4}/\d{1,4}"))), try_choice),
    "masks": Area(
        st.tuples(
            st.one_of(st.integers(2, 6), st.integers(2, 300)),
            st.one_of(
                st.lists(st.integers(0, 1), min_size=1, max_size=8),
                st.lists(st.one_of(st.integers(0, 3), st.integers(0, 65535)), min_size=1, max_size=8),
            ),
            st.one_of(
                st.none(),
                st.none(),
                st.dictionaries(
                    st.one_of(st.integers(-1, 70000), st.just("other"), st.text(max_size=3)),
                    st.integers(-1, 300),
                    max_size=4,
                ),
            ),
            st.one_of(st.just(255), st.integers(-1, 300)),
        ),
        try_mask,
    ),
    "paths": Area(st.tuples(NAMES, NAMES, NAMES), try_path),
    "sizes": Area(st.tuples(st.integers(1, 120), st.integers(1, 120), st.integers(30, 70)), try_size),
    "checkpoints": Area(
        st.one_of(HOW, st.dictionaries(st.sampled_from(HPARAMS), VALUES, min_size=1, max_size=2)), try_checkpoint
    ),
    "caches": Area(HOW, try_cache),
    "run folders": Area(
        st.fixed_dictionaries(
            {
                name: st.one_of(st.just(good), ANY_BYTES, HOW.map(lambda how, good=good: broken(good, how)))
                for name, good in GOOD.items()
            }
        ),
        try_run_folder,
    ),
}


def run_area(name: str, seed: int, examples: int, counts: Counter) -> str | None:
    """Try so many inputs of an area; return the smallest that fails, with its error, or None."""
    area, last = AREAS[name], []

    @hypothesis_seed(seed)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
    )
    @given(area.strategy)
    def try_all(drawn: Any) -> None:
        last[:] = [drawn]
        counts[outcome(area, drawn)] += 1

    try:
        try_all()
    except Exception:
        return f"{last[0]!r}\n{traceback.format_exc(limit=-6)}".replace(f"{Path(__file__).parents[2]}/", "")
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--only", choices=AREAS, nargs="+", default=[*AREAS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))  # found rather than the end of all
    counts, failures, started = {name: Counter() for name in options.only}, [], time.monotonic()
    seed = options.seed
    while time.monotonic() - started < 60 * options.minutes:
        for name in options.only:
            if (failure := run_area(name, seed, 50, counts[name])) is not None:
                failures.append({"area": name, "seed": seed, "error": failure})
                print(f"FAILURE in {name}, seed {seed}: {failure}", flush=True)
            if time.monotonic() - started >= 60 * options.minutes:
                break
        seed += 1
    table = {name: {"inputs": sum(found.values()), **found} for name, found in counts.items()}
    total = {key: sum(row.get(key, 0) for row in table.values()) for key in ("inputs", CLEAN, CLEAR)}
    report = {
        "seeds": [options.seed, seed],
        "minutes": round((time.monotonic() - started) / 60, 1),
        "areas": table,
        "total": {**total, "failures": len(failures)},
        "failures": failures,
    }
    print(json.dumps({key: report[key] for key in ("minutes", "areas", "total")}, indent=2))
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
