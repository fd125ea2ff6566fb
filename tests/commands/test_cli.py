import io
import json
import sys

import pytest
import torch
import yaml
from helpers import TINY, compose_config, compose_train, run_command
from helpers.processes import run_forked
from omegaconf import OmegaConf

from mlpmatch_pl.__main__ import COMMANDS
from mlpmatch_pl.commands.cli import (
    check_arguments,
    keep_last_length,
    literal_paths,
    print_plainly,
    training_arguments,
)
from mlpmatch_pl.engine.trainer import length_of_training
from mlpmatch_pl.train import train
from mlpmatch_pl.utils.errors import UserError


def modification_times(run):
    return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "train.log"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run by the command, with two processes: the run folder and the output."""
    folder = tmp_path_factory.mktemp("run")
    processes = ("trainer.accelerator=cpu", "trainer.devices=2", "loader.batch_size=2")
    result = run_forked("train", *TINY, *processes, "hydra.run.dir=run", cwd=folder, module="mlpmatch_pl")
    assert result.returncode == 0, result.stderr
    assert [path.name for path in folder.iterdir()] == ["run"]
    return folder / "run", result.stdout


def test_a_run_leaves_what_it_promises(finished):
    run, _ = finished
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert {"config.yaml", "labeled.txt", "val.txt", "splits.json", "metrics.json", "metrics.csv", "train.log"} <= names
    assert {"checkpoints/best.ckpt", "checkpoints/last.ckpt"} <= names
    assert {"predictions/test_0000.png", "predictions/test_0002.png"} <= names
    assert not any(name.startswith((".hydra", "wandb")) for name in names)


def test_a_run_prints_the_split_the_learning_rate_and_the_table_once(finished):
    _, output = finished
    assert "4 labeled images (4 (seed 0), sha256 " in output
    assert output.count("learning rate 0.025 for 8 images in an optimizer step (0.05 for 16)") == 1
    for name in ("background", "disk", "square", "triangle", "star", "cross", "mean"):
        assert f"│ {name}" in output


def test_metrics_json_is_complete_and_agrees_with_the_csv(finished):
    run, _ = finished
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["labeled"]["count"] == 4
    assert len(metrics["labeled"]["sha256"]) == 64
    assert metrics["steps"] == 5
    assert {"val/miou", "val/acc", "val/dice", "val/iou/background", "train/loss_x_np"} <= set(metrics["last"])
    rows = (run / "metrics.csv").read_text().splitlines()
    assert f"{metrics['test']['test/miou']}" in rows[-1]
    assert len(rows) == 3  # header, one validation, one test: the second process writes nothing


def test_checkpoints_hold_nothing_but_tensors_and_plain_data(finished):
    run, _ = finished
    for name in ("best", "last"):
        checkpoint = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert checkpoint["hyper_parameters"]["method"]["name"] == "mlpmatch"


def test_the_saved_configuration_trains_again(finished, tmp_path):
    run, _ = finished
    before = modification_times(run)
    saved = (run / "config.yaml").read_text().replace(str(run), str(tmp_path))
    cfg = OmegaConf.create(yaml.safe_load(saved))
    cfg.trainer.devices = 1
    metrics = train(cfg)
    assert before == modification_times(run)
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file()
    assert metrics["labeled"]["sha256"] == json.loads((run / "splits.json").read_text())["labeled"]["sha256"]


def test_a_finished_run_is_never_overwritten(finished, command):
    run, _ = finished
    before = modification_times(run)
    code, _, errors = command("train", *TINY, f"hydra.run.dir={run}")
    assert code == 1
    assert "expected a new run folder, but " in errors
    assert "resume=auto" in errors
    assert len(errors.strip().splitlines()) == 1
    assert before == modification_times(run)


def test_a_finished_run_has_nothing_to_resume(finished, tmp_path):
    run, _ = finished
    cfg = compose_train(*TINY, f"resume={run}/checkpoints/last.ckpt", output_dir=tmp_path)
    with pytest.raises(UserError, match=r"last\.ckpt has finished all 1; raise schedule\.steps above 5"):
        train(cfg)


def test_a_checkpoint_of_another_architecture_is_refused(finished, tmp_path):
    run, _ = finished
    resume = f"resume={run}/checkpoints/last.ckpt"
    cfg = compose_train(*TINY, "decoder.channels=16", resume, output_dir=tmp_path)
    with pytest.raises(UserError, match=r"it has decoder={.*'channels': 8, .* and the configuration decoder="):
        train(cfg)


@pytest.mark.parametrize("steps_per_epoch", [1, 3, 59, 1000])
def test_a_schedule_in_steps_covers_them_and_validates_the_last(steps_per_epoch):
    epochs, every = length_of_training({"epochs": None, "steps": 500}, steps_per_epoch)
    assert epochs * steps_per_epoch >= 500 > (epochs - every) * steps_per_epoch
    assert epochs % every == 0
    assert epochs // every <= 40


# Sweeps ---------------------------------------------------------------------------------------------------------------


def test_a_sweep_gives_one_folder_per_job_and_continues_after_a_failed_one(command, tmp_path):
    code, output, errors = command("train", "-m", *TINY, "dataset.labeled=99,4", "schedule.steps=1")
    assert code == 1
    assert "0_shapes_mlpmatch_99_s0: expected dataset.labeled of at most 24" in output
    assert "Traceback" not in errors
    (sweep,) = (tmp_path / "multirun").iterdir()
    results = {path.parent.name for path in sweep.rglob("metrics.json")}
    assert results == {"1_shapes_mlpmatch_4_s0"}


def test_a_sweep_over_several_processes_is_refused(command):
    code, output, _ = command("train", "-m", *TINY, "seed=0,1", "trainer.accelerator=cpu", "trainer.devices=2")
    assert code == 1
    assert ": expected one device per job in a sweep, but got 2 processes; set trainer.devices=1" in output


# Help -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_the_command_and_ends_with_examples(name, command):
    code, output, errors = command(name, "--help")
    assert (code, errors) == (0, "")
    first, *_, last = output.strip().splitlines()
    assert first.endswith(".")
    assert last.startswith(f"    python -m mlpmatch_pl.{name} ")
    assert "overwrite: false" in output or name in ("train", "check", "benchmark", "prepare")
    assert ("dataset=shapes" in output) == (name in ("train", "check", "benchmark"))
    assert "Hydra" not in output.replace("Hydra application", "")


@pytest.mark.parametrize("question", [["train", "--help"], ["predict", "--help"], ["check", "--cfg", "job"], []])
def test_questions_are_answered_without_heavy_imports(question, tmp_path):
    result = run_command(*question, cwd=tmp_path, module="mlpmatch_pl", PYTHONPROFILEIMPORTTIME="1")
    imported = {
        line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")
    }
    assert result.returncode == 0
    assert "mlpmatch_pl" in imported
    assert not imported & {"torch", "numpy", "lightning", "timm", "cv2", "wandb", "pydantic"}


def test_the_package_prints_its_commands_and_names_the_nearest(tmp_path):
    listed = run_command(cwd=tmp_path, module="mlpmatch_pl")
    assert [line.split()[0] for line in listed.stdout.splitlines() if line.startswith("  ")] == [*COMMANDS]
    wrong = run_command("trein", cwd=tmp_path, module="mlpmatch_pl")
    assert wrong.returncode == 1
    assert wrong.stderr.strip() == (
        f"error: there is no command trein, only {', '.join(COMMANDS)}. Did you mean train?"
    )


# Wrong input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("dataset.labelet=4", "the configuration has no key dataset.labelet. Did you mean dataset.labeled"),
        ("~method.lambda_max", "expected a value for method.lambda_max, but the configuration lacks it; set"),
        ("~loader.scale", "expected a value for loader.scale, but the configuration lacks it; set"),
        ("output_dir=elsewhere", "expected the folder as hydra.run.dir=..., or hydra.sweep.dir=... with -m, but got"),
        ("method=mlpmach", "there is no method=mlpmach, only fixmatch, mlpmatch"),
        ("dataset.labeled=1_8", "but got 1_8, which Hydra reads as the integer 18; write dataset.labeled=1/8"),
        ("dataset=folder", "expected a value for dataset.root, but none is set"),
        ("loader.strong.blur_p=0", "expected an index into a list, as in loader.strong.0.p=1.0, but got blur_p"),
    ],
)
def test_wrong_input_is_one_line(override, sentence, command):
    code, _, errors = command("train", override)
    assert code == 1
    assert sentence in errors
    assert len(errors.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["dataset.labeled=25"], "expected dataset.labeled of at most 24, the number of images with a mask"),
        (["dataset.labeled=24"], "expected unlabeled images beside the 24 labeled ones, but there are none"),
        (["backbone=timm", "backbone.name=resnet5O"], "but got 'resnet5O'. Did you mean resnet50"),
        (["backbone.pretrained=nowhere.pth"], "expected a file with weights, but nowhere.pth does not exist"),
        (["init_weights=nowhere.pth"], "expected a file with weights, but nowhere.pth does not exist"),
        (["loader.batch_size=1", "method=fixmatch"], "expected at least 2 images in every pass, because BatchNorm"),
        (["loader.unlabeled_batch_size=1"], "so that CutMix has a different image as partner, but got 1"),
        (["loader.crop_size=20"], "expected loader.crop_size from 33 to 8192 pixels, but got 20"),
        (["schedule.epochs=2"], "but got epochs=2, steps=5"),
        (["+trainer.max_epochs=3"], "expected trainer.max_epochs to be left to this command; set schedule.epochs"),
        (["dataset.labeled=nowhere.txt"], "expected a list file, but nowhere.txt does not exist"),
        (["trainer.accelerator=cpu", "trainer.devices=4"], "expected at least 4 test images, one "),
        (["resume=nowhere.ckpt"], "expected a checkpoint to resume from, but nowhere.ckpt does not exist"),
        (["method.partner=other"], "expected method.partner as batch, flipped or same_image, but got 'other'"),
        (["objective.criterion.name=oem"], "expected a criterion of ce, ohem, dice, but got 'oem'. Did you mean ohem?"),
        (["evaluation.absent=skip"], "expected evaluation.absent as exclude or zero, but got 'skip'"),
        (["trainer.sync_batchnorm=true", "trainer.accelerator=cpu"], "expected a GPU for trainer.sync_batchnorm=true"),
        (["logger=wandb", "logger.wandb.mode=on"], "expected logger.wandb.mode of online, offline, disabled"),
    ],
)
def test_wrong_values_are_found_before_anything_is_written(overrides, sentence, tmp_path):
    cfg = compose_train(*TINY, *overrides, output_dir=tmp_path / "run")
    with pytest.raises(Exception) as error:  # noqa: PT011  # Hydra wraps what a target raises
        train(cfg)
    chain = [error.value]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    assert any(isinstance(link, UserError) and sentence in str(link) for link in chain), chain
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("written", "key", "value"),
    [
        (["schedule.epochs=1"], "schedule", (1, None, None)),
        (["schedule.epochs=1", "schedule.steps=7"], "schedule", (None, 7, None)),
        (["schedule.steps=7", "schedule.minutes=2", "schedule.epochs=null"], "schedule", (None, None, 2)),
        (["schedule.steps=7", "schedule.minutes=2", "++schedule.steps=8"], "schedule", (None, 8, None)),
        (["schedule=voc", "schedule.minutes=null"], "schedule", (80, None, None)),
        (["trainer.limit_val_batches=2", "optimizer.nesterov=true"], "trainer.limit_val_batches", 2),
        (["objective.criterion={name: ce, dice_weight: 1}"], "objective.criterion.dice_weight", 1),
        (["objective.criterion.min_kept=9"], "objective.criterion", {"name": "ce", "min_kept": 9}),
        (["objective.criterion=ohem"], "objective.criterion", "ohem"),
    ],
)
def test_the_last_length_wins_and_open_mappings_need_no_plus(written, key, value):
    cfg = compose_config("train", *training_arguments(written))
    keep_last_length(cfg, written)
    found = OmegaConf.select(cfg, key)
    assert value == ((found.epochs, found.steps, found.minutes) if key == "schedule" else found)


def test_the_last_length_wins_in_a_job_whose_listed_arguments_are_those_written(tmp_path):
    written = (*TINY, "method=supervised", "schedule.epochs=1")  # TINY has steps
    done = run_forked("-m", *written, "hydra.sweep.dir=sweep", cwd=tmp_path, module="mlpmatch_pl.train")
    assert done.returncode == 0, done.stderr
    (run,) = {path.parent for path in tmp_path.glob("sweep/*/config.yaml")}
    schedule = OmegaConf.load(run / "config.yaml").schedule
    assert (schedule.epochs, schedule.steps, schedule.minutes) == (1, None, None)
    assert {*OmegaConf.load(run / "overrides.yaml")} == {*written}
    (job,) = (line for line in done.stdout.splitlines() if "#0 : " in line)
    assert {*job.partition("#0 : ")[2].split()} == {*written}


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("trainer.limit_val_batch=1", "the configuration has no key trainer.limit_val_batch. Did you mean limit_val_b"),
        ("hydra/launcher=joblib", "expected the plugin of hydra/launcher=joblib, but it is not installed; run pip ins"),
    ],
)
def test_an_unknown_argument_and_a_missing_plugin_are_one_line(override, sentence, command, monkeypatch):
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    Plugins.instance()  # plugins register themselves when they are found
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["launcher"], "joblib.yaml")
    code, _, errors = command("train", *TINY, override)
    assert code == 1
    assert sentence in errors
    assert len(errors.strip().splitlines()) == 1


def test_quoted_fractions_and_list_files_are_not_refused():
    stamped = "dataset.labeled=runs/2026-01-02_03-04-05_shapes/labeled.txt"
    check_arguments(["dataset.labeled=1/8", "dataset.labeled=splits/1_8/labeled.txt", "name=1_8", stamped])
    with pytest.raises(UserError, match=r"write dataset\.labeled=1/16"):
        check_arguments(["dataset.labeled=1/4,1_16"])


@pytest.mark.parametrize(
    "name", ["données", "数据", "shots (1)", "a=b", "x[1]", "a, b", "it's", "{x}", "2019", "null_", "a:b", "back\\\\"]
)
@pytest.mark.parametrize("key", ["dataset.root", "dataset.masks", "init_weights"])
def test_paths_of_any_name_reach_the_configuration(key, name):
    config = compose_config("train", *literal_paths(["dataset=folder", f"{key}={name}"]))
    assert OmegaConf.select(config, key) == name


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("[背景,道路]", ["背景", "道路"]),
        ("[a (old), b=c,'d, e']", ["a (old)", "b=c", "d, e"]),
        ("[background,road]", ["background", "road"]),
    ],
)
def test_class_names_of_any_characters_reach_the_configuration(written, names):
    config = compose_config("train", *literal_paths(["dataset=folder", f"dataset.classes={written}"]))
    assert list(config.dataset.classes) == names


@pytest.mark.parametrize(
    "argument",
    [
        "dataset.val=1/8",
        "dataset.labeled=92",
        "dataset.root=[a,b]",
        "~method.burn_in",
        "dataset.mask_values={0:0}",
        "x=",
    ],
)
def test_what_hydra_reads_stays_as_it_is(argument):
    assert literal_paths([argument]) == [argument]


def test_a_sweep_keeps_its_commas_and_quotes_names_beyond_ascii():
    arguments = ["-m", "seed=0,1", "dataset.root=a,b", "dataset.masks=données"]
    assert literal_paths(arguments) == [*arguments[:3], "dataset.masks='données'"]


@pytest.mark.parametrize(
    "key", [*(f"dataset.{part}" for part in ("train", "labeled", "unlabeled", "val", "test")), "backbone.pretrained"]
)
def test_paths_with_a_comma_are_no_sweep_where_other_values_are_choices_too(key):
    group, name = key.split(".")
    for path in ("a, b.txt", "[old] a (1)/x=y.txt", "sort(a)"):
        config = compose_config("train", *literal_paths(["dataset=folder", f"{key}={path}"]))
        assert config[group][name] == path
    for value in ("0.2", "20", "1/8", "null", "auto", "[a,b]", "lists/a.txt", "true"):
        assert literal_paths([f"{key}={value}"]) == [f"{key}={value}"]


@pytest.mark.parametrize(
    ("encoding", "printed"), [("cp1252", b"+-| +- \xe9 \\u80cc x"), ("ascii", b"+-| +- \\xe9 \\u80cc x")]
)
def test_consoles_without_utf8_get_plain_characters(monkeypatch, encoding, printed):
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", console)
    print_plainly()
    print("┏━┃ └─ é 背 x", end="", flush=True)
    assert console.buffer.getvalue() == printed
