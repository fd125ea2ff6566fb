"""What the commands share: Hydra, ``--help``, and errors as one line that names the nearest key for a typo."""

from __future__ import annotations

import ast
import codecs
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, update_wrapper
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mlpmatch_pl.utils.distributed import time_stamp
from mlpmatch_pl.utils.errors import UserError, suggest

LIKE_TRAIN = ("train", "check", "benchmark")  # commands that take the configuration of a training
PACKAGES = {"prepare": "mlpmatch_pl.commands.prepare"}  # of primary configs outside mlpmatch_pl.conf
_PATHS = ("checkpoint", "input", "output", "root", "archives", "annotations", "init_weights", "resume")
_FOLDERS = ("dataset.root", "dataset.images", "dataset.masks", "hydra.run.dir", "hydra.sweep.dir")  # may be lists
# Also numbers, fractions, lists and other choices; only what is none of these is a path to quote.
_PATHS_OR_CHOICES = (
    *(f"dataset.{part}" for part in ("train", "labeled", "unlabeled", "val", "test")),
    "backbone.pretrained",
    "loader.cache",
)
_CHOICE = re.compile(r"\[.*\]|[\w./+-]*", re.S)
_PLAIN = str.maketrans(
    {"─": "-", "━": "-", "│": "|", "┃": "|", "╇": "+", "╈": "+", "\u00d7": "x", "…": "...", "\u2013": "-"}
)
_LENGTH = re.compile(r"\+*schedule\.(epochs|steps|minutes)=(?!null$)")
# Mappings that take more keys than the configuration names.
_OPEN = ("trainer.", "optimizer.", "objective.criterion")
_PLUGINS = ("joblib", "submitit_local", "submitit_slurm", "optuna")  # of the extra "sweep"
_ITEM = re.compile(r"""\s*(?:'(?:\\.|[^'])*'|"(?:\\.|[^"])*"|[^,])+""")
_UNDERSCORED = re.compile(r"""^[+~]*dataset\.(labeled|val)=(?:.*[,\[])?['"]*(\d+)_(\d+)['"]*(?:$|[,\]])""")


def folder_name(value: object) -> str:
    """Return a choice of labels in a form that fits into a folder name.

    Example:
        >>> folder_name("blended/1-16"), folder_name(92), folder_name(None)
        ('blended-1-16', '92', 'all')
    """
    return "all" if value is None else re.sub(r"[^\w.+-]+", "-", str(value)).strip("-")


OmegaConf.register_new_resolver("mlpmatch_pl.name", folder_name, replace=True)


class JobError(UserError):
    """A job of a sweep failed; the summary of the sweep says why."""


def run_command(name: str, function: Callable[[DictConfig], Any], doc: str | None) -> None:
    """Run a command with the configuration that Hydra composes from its config file and the command line.

    Wrong input ends with one line on stderr and exit code 1.

    Args:
        name: Name of the command and of its primary config.
        function: Takes the composed configuration.
        doc: Docstring of the command, the main part of ``--help``.
    """
    package = PACKAGES.get(name, "mlpmatch_pl.conf")
    print_plainly()
    with guarded(name):
        if {"-h", "--help"} & set(sys.argv[1:]):
            from mlpmatch_pl.commands.help import help_page

            print(help_page(name, package, doc or ""))
            return
        check_arguments(sys.argv[1:])
        sys.argv[1:] = literal_paths(sys.argv[1:])
        if name in LIKE_TRAIN:
            sys.argv[1:] = training_arguments(sys.argv[1:])
        if "MLPMATCH_STAMP" not in os.environ:  # the processes that Lightning starts inherit it
            os.environ["MLPMATCH_STAMP"] = time_stamp(os.environ)
        import hydra

        # Hydra names the job after the function's module.
        job = update_wrapper(partial(_run_job, name, function), function)
        hydra.main(version_base="1.3", config_path=f"pkg://{package}", config_name=name)(job)()


def print_plainly() -> None:
    """Print plain characters where a console or a pipe cannot show others, instead of failing."""
    codecs.register_error("mlpmatch_pl.plain", _plain_characters)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="mlpmatch_pl.plain")


def _plain_characters(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    plain = "".join("+" if "\u2500" <= mark <= "\u257f" else mark for mark in text.translate(_PLAIN))
    return plain.encode("ascii", "backslashreplace").decode(), error.end


def _run_job(name: str, function: Callable[[DictConfig], Any], cfg: DictConfig) -> Any:
    """Run a job. A parallel launcher's processes import this module, and its resolver, to find this function."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    # Hydra reports the failed jobs of a sweep at its end. To an error in a single run it would add a line of its own.
    with guarded(name) if HydraConfig.get().mode == RunMode.RUN else nullcontext():
        if name in LIKE_TRAIN:
            keep_last_length(cfg, HydraConfig.get().overrides.task)
        return function(cfg)


def plain(cfg: DictConfig) -> Any:
    """Return a configuration as plain data, with all interpolations resolved."""
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse arguments that Hydra would accept but not as they are meant.

    Raises:
        UserError: For ``dataset.labeled=1_8``, which Hydra reads as the integer 18, and for ``output_dir=``, because
            Hydra's log would still go to ``hydra.run.dir``.

    Example:
        >>> check_arguments(["dataset.labeled=1/8"])
        >>> check_arguments(["dataset.labeled=1_8"])
        Traceback (most recent call last):
        ...
        mlpmatch_pl.utils.errors.UserError: expected a fraction such as 1/8, but got 1_8, ...
    """
    for argument in arguments:
        if match := _UNDERSCORED.match(argument):
            key, part, whole = match.groups()
            raise UserError(
                f"expected a fraction such as 1/8, but got {part}_{whole}, which Hydra reads as the integer "
                f"{part}{whole}; write dataset.{key}={part}/{whole}"
            )
        if argument.lstrip("+").startswith("output_dir="):
            raise UserError(
                f"expected the folder as hydra.run.dir=..., or hydra.sweep.dir=... with -m, but got {argument}; use "
                "those"
            )


def training_arguments(arguments: Sequence[str]) -> list[str]:
    """Return a training's arguments as Hydra needs them.

    Arguments of Lightning's Trainer, the optimizer and the criterion need no ``+``, whether or not the configuration
    names them; others are refused when it is validated.

    Example:
        >>> training_arguments(["schedule.steps=9", "trainer.limit_val_batches=1"])
        ['schedule.steps=9', '++trainer.limit_val_batches=1']
    """
    return [f"++{argument}" if argument.startswith(_OPEN) else argument for argument in arguments]


def keep_last_length(cfg: DictConfig, arguments: Sequence[str]) -> None:
    """Set the other lengths of a training to null than the one that is given last on the command line.

    Example:
        >>> cfg = OmegaConf.create({"schedule": {"epochs": 80, "steps": 9, "minutes": None}})
        >>> keep_last_length(cfg, ["schedule.steps=9"])
        >>> cfg.schedule
        {'epochs': None, 'steps': 9, 'minutes': None}
    """
    given = [match[1] for argument in arguments if (match := _LENGTH.match(argument))]
    for key in {"epochs", "steps", "minutes"} - set(given[-1:]) if given else ():
        cfg.schedule[key] = None


def added_keys(arguments: Sequence[str]) -> list[str]:
    """Add Hydra's ``+`` to keys of the run's own dataset, which the configuration does not contain.

    Example:
        >>> added_keys(["dataset.root=/data", "part=val"]), added_keys(["dataset=camvid", "dataset.root=/data"])
        (['+dataset.root=/data', 'part=val'], ['dataset=camvid', 'dataset.root=/data'])
    """
    if any(argument.startswith("dataset=") for argument in arguments):
        return list(arguments)
    return [f"+{argument}" if argument.startswith("dataset.") else argument for argument in arguments]


def literal_paths(arguments: Sequence[str], keys: Collection[str] = _PATHS) -> list[str]:
    r"""Quote the paths among a command's arguments, because Hydra's grammar has a meaning for many of their characters.

    Quoted paths are left alone, and so are all paths of a sweep, where a comma separates jobs. Values of other keys,
    and the items of lists, are quoted if Hydra cannot read them, as names beyond ASCII.

    Example:
        >>> literal_paths(["input=Föhr (2), 'x'/epoch=1.jpg", "save=[index]", "output='a b'"])
        ["input='Föhr (2), \\'x\\'/epoch=1.jpg'", 'save=[index]', "output='a b'"]
        >>> literal_paths(["dataset.root=x[1]", "dataset.classes=[背景,b (old)]", "dataset.val=1/8", "dataset.train=é"])
        ["dataset.root='x[1]'", "dataset.classes=['背景','b (old)']", 'dataset.val=1/8', "dataset.train='é'"]
        >>> literal_paths(["dataset.val=a, b.txt", "dataset.labeled=[20]"]), literal_paths(["dataset.val=2,4", "-m"])
        (["dataset.val='a, b.txt'", 'dataset.labeled=[20]'], ['dataset.val=2,4', '-m'])
    """
    several = bool({"-m", "--multirun"} & set(arguments))
    return [_literal(argument, keys, several) for argument in arguments]


def _literal(argument: str, keys: Collection[str], several: bool) -> str:
    key, sign, value = argument.partition("=")
    if not sign or not re.fullmatch(r"[+~]*[\w.@/:]+", key):
        return argument
    name = key.lstrip("+")
    is_folder = name in _FOLDERS and not value.startswith("[")
    if not several and (name in keys or is_folder or (name in _PATHS_OR_CHOICES and not _CHOICE.fullmatch(value))):
        return _quoted(argument)
    if _is_valid(argument) or (several and "," in value and not value.startswith("[")):
        return argument
    if value.startswith("[") and value.endswith("]"):
        listed = f"{key}=[{','.join(map(_quoted_item, _ITEM.findall(value[1:-1])))}]"
        if _is_valid(listed):
            return listed
    quoted = _quoted(argument)
    return quoted if "{" not in value and _is_valid(quoted) else argument


def _is_valid(argument: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True


def _quoted_item(item: str) -> str:
    item = item.strip()
    return item if item.startswith(("'", '"', "[", "{")) else _quoted(f"={item}")[1:]


def _quoted(argument: str) -> str:
    key, _, value = argument.partition("=")
    if value in ("", "null") or (len(value) > 1 and value[0] == value[-1] and value[0] in "'\""):
        return argument
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
    return f"{key}='{escaped}'"


@contextmanager
def guarded(config_name: str) -> Iterator[None]:
    """Turn wrong input into one line on stderr and exit code 1, Ctrl-C into 130; other errors keep their traceback.

    Args:
        config_name: Primary config of the command, in which the nearest key of a mistyped override is looked up.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # otherwise Hydra prints a shortened traceback and exits
    try:
        yield
    except BrokenPipeError:  # as in `... --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes when it exits
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except JobError:
        sys.exit(1)
    except Exception as error:
        message = one_sentence(error, config_name)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)


def one_sentence(error: BaseException, config_name: str) -> str | None:
    """Return what to tell the user of an error, or None for a bug."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for link in chain:
        if isinstance(link, UserError):  # one from a data worker comes with the worker's traceback
            return str(link).rstrip().rpartition(f"{UserError.__module__}.UserError: ")[2]
    for text in map(str, chain):
        if match := re.search(r"UserError\((['\"].*['\"])\)", text):  # from a job in another process
            return str(ast.literal_eval(match[1]))
        if match := re.search(r"Key '[^']+' is not in struct\s+full_key: (\S+)", text):
            return f"the configuration has no key {match[1]}." + suggest(match[1], _similar_keys(match[1], config_name))
        if match := re.search(r"Could not find '([^']+)/([^'/]+)'\s+Available options in '[^']+':\s+(.*?)\s+Config sea",
                              text, re.S):  # fmt: skip
            if match[2] in _PLUGINS:
                return (
                    f"expected the plugin of {match[1]}={match[2]}, but it is not installed; run "
                    "pip install 'mlpmatch_pl[sweep]'"
                )
            options = match[3].split()
            return f"there is no {match[1]}={match[2]}, only {', '.join(options)}." + suggest(match[2], options)
        if match := re.search(r"Missing mandatory value: \S+\s+full_key: (\S+)", text):
            return f"expected a value for {match[1]}, but none is set; add {match[1]}=... to the command"
        if match := re.search(r"invalid literal for int\(\) with base 10: '(\w+)'", text):  # OmegaConf's, at a list
            keys = [argument for argument in sys.argv[1:] if f".{match[1]}" in argument.partition("=")[0]]
            if keys:
                return f"expected an index into a list, as in loader.strong.0.p=1.0, but got {match[1]} in {keys[0]}"
        if match := re.search(r"Environment variable '(\w+)' not found", text):
            return f"expected the environment variable {match[1]}, but it is not set; export {match[1]}=..."
    for link in chain:
        if isinstance(link, HydraException | OmegaConfBaseException):
            return " ".join(str(link).split())
        if isinstance(link, OSError) and link.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return (
                f"expected access to {link.filename}, but the system denies it ({link.strerror}); change its "
                "permissions, or choose another folder"
            )
        if type(link).__name__ == "MisconfigurationException":  # Lightning's, which is slow to import
            return f"Lightning refuses the trainer's configuration: {link}"
    return None


def _similar_keys(wrong: str, config_name: str) -> list[str]:
    """Return the keys at the depth of a wrong key in the configuration that the command's group choices compose."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    def keys(node: Any, prefix: str = "") -> Iterator[str]:
        for key, child in node.items() if isinstance(node, dict) else ():
            yield f"{prefix}{key}"
            yield from keys(child, f"{prefix}{key}.")

    GlobalHydra.instance().clear()
    groups = [argument for argument in sys.argv[1:] if re.fullmatch(r"[a-z_]+=[\w-]+", argument)]
    with initialize_config_module(PACKAGES.get(config_name, "mlpmatch_pl.conf"), version_base="1.3"):
        try:
            composed = compose(config_name, groups)
        except HydraException:  # the wrong key is one without a dot, and so among the groups
            composed = compose(config_name)
    config = OmegaConf.to_container(composed, resolve=False)
    return [key for key in keys(config) if key.count(".") == wrong.count(".")]
