"""What the commands share: errors as one line, with the nearest key for a typo."""

import ast
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from omegaconf import OmegaConf

from mlpmatch_pl.utils.distributed import time_stamp
from mlpmatch_pl.utils.errors import UserError, suggest

_PATHS = ("checkpoint", "input", "output")
_ELSEWHERE = {"prepare": "mlpmatch_pl.commands.prepare"}  # primary configs that are not in conf/
_UNDERSCORED = re.compile(r"""^[+~]*dataset\.(labeled|val)=(?:.*[,\[])?['"]*(\d+)_(\d+)['"]*(?:$|[,\]])""")


def folder_name(value: object) -> str:
    """Write a choice of labels so that it can stand in a folder's name.

    Example:
        >>> folder_name("blended/1-16"), folder_name(92), folder_name(None)
        ('blended-1-16', '92', 'all')
    """
    return "all" if value is None else re.sub(r"[^\w.+-]+", "-", str(value)).strip("-")


# Here, because the processes of a parallel launcher import this module before they resolve the configuration.
OmegaConf.register_new_resolver("mlpmatch_pl.name", folder_name, replace=True)


def refuse_underscored_fractions(arguments: Sequence[str]) -> None:
    """Refuse ``dataset.labeled=1_8``: Hydra reads it as the number 18.

    Example:
        >>> refuse_underscored_fractions(["dataset.labeled=1/8"])
        >>> refuse_underscored_fractions(["dataset.labeled=1_8"])
        Traceback (most recent call last):
        ...
        mlpmatch_pl.utils.errors.UserError: expected a fraction such as 1/8, but got 1_8, ...
    """
    for argument in arguments:
        if match := _UNDERSCORED.match(argument):
            key, part, whole = match.groups()
            raise UserError(
                f"expected a fraction such as 1/8, but got {part}_{whole}, which Hydra reads as the number "
                f"{part}{whole}; write dataset.{key}={part}/{whole}"
            )


def literal_paths(arguments: Sequence[str], keys: Sequence[str] = _PATHS) -> list[str]:
    r"""Quote the paths among a command's arguments, as Hydra reads many characters of file names as its own grammar.

    Paths that are quoted already are left as they are, and in a sweep all of them, since a comma separates jobs there.

    Example:
        >>> literal_paths(["input=Föhr (2), 'x'/epoch=1.jpg", "save=[index]", "output='a b'"])
        ["input='Föhr (2), \\'x\\'/epoch=1.jpg'", 'save=[index]', "output='a b'"]
    """
    if {"-m", "--multirun"} & set(arguments):
        return list(arguments)
    return [_quoted(argument) if argument.partition("=")[0] in keys else argument for argument in arguments]


def _quoted(argument: str) -> str:
    key, _, value = argument.partition("=")
    if not value or (len(value) > 1 and value[0] == value[-1] and value[0] in "'\""):
        return argument
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
    return f"{key}='{escaped}'"


def run_command(config_name: str, hydra_main: Callable[[], None]) -> None:
    """Run a Hydra command that takes a training configuration; wrong input ends with one line and exit code 1.

    Args:
        config_name: The command's primary config.
        hydra_main: The function that `hydra.main` wraps.
    """
    if "MLPMATCH_STAMP" not in os.environ:  # the processes that Lightning starts have it from the first
        os.environ["MLPMATCH_STAMP"] = time_stamp(os.environ)
    with guarded(config_name):
        refuse_underscored_fractions(sys.argv[1:])
        _refuse_output_dir(sys.argv[1:])
        hydra_main()


def _refuse_output_dir(arguments: Sequence[str]) -> None:
    """Refuse a second name for the folder: Hydra would write its log into the one, and the command into the other."""
    if given := [argument for argument in arguments if argument.lstrip("+").startswith("output_dir=")]:
        raise UserError(
            f"expected the folder as hydra.run.dir=..., or hydra.sweep.dir=... with -m, but got {given[0]}; use those"
        )


def sweep_folder(arguments: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """Return the folder of a training sweep's jobs; None if the arguments are no sweep's.

    Example:
        >>> sweep_folder(["-m", "seed=0,1"], {"MLPMATCH_STAMP": "2026-01-31_12-00-00"})
        'multirun/2026-01-31_12-00-00'
        >>> sweep_folder(["-m", "hydra.sweep.dir=mine"], {})
        'mine'
    """
    if not {"-m", "--multirun"} & set(arguments):
        return None
    named = [argument.partition("=")[2] for argument in arguments if argument.startswith("hydra.sweep.dir=")]
    return named[-1] if named else f"multirun/{environment['MLPMATCH_STAMP']}"


def guarded_job(config_name: str) -> AbstractContextManager[None]:
    """Guard a single run; a job of a sweep fails on its own and leaves the others, and Hydra names it at the end."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return guarded(config_name) if HydraConfig.get().mode == RunMode.RUN else nullcontext()


@contextmanager
def guarded(config_name: str) -> Iterator[None]:
    """Turn wrong input into one line on stderr and exit code 1; other errors keep their traceback.

    Args:
        config_name: The command's primary config, to find the nearest key of a mistyped override.
    """
    # Hydra would print its own shortened trace and exit; with this it raises, and the decision is made here.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        yield
    except BrokenPipeError:  # as in `... --help | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        sys.exit(1)
    except Exception as error:
        message = _message(error, config_name)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)


def _message(error: BaseException, config_name: str) -> str | None:
    """Return what to tell the user, or None for an error that is not theirs."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for link in chain:
        if isinstance(link, UserError):
            # A worker process sends its traceback along.
            return str(link).rstrip().rpartition(f"{UserError.__module__}.UserError: ")[2]
    for text in map(str, chain):
        # A job in another process sends its error as text.
        if match := re.search(r"UserError\((['\"].*['\"])\)", text):
            return str(ast.literal_eval(match[1]))
        if match := re.search(r"Key '([^']+)' is not in struct\s+full_key: (\S+)", text):
            return f"the configuration has no key {match[2]}." + suggest(match[2], _similar_keys(match[2], config_name))
        if match := re.search(
            r"Could not find '([^']+)/([^'/]+)'\s+Available options in '[^']+':\s+(.*?)\s+Config search path",
            text,
            re.S,
        ):
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
                f"expected to be allowed to use {link.filename}, but the system refuses ({link.strerror}); change its "
                "rights, or choose another folder"
            )
        if type(link).__name__ == "MisconfigurationException":  # Lightning's; not imported for its sake
            return f"Lightning refuses the trainer's configuration: {link}"
    return None


def _similar_keys(wrong: str, config_name: str) -> list[str]:
    """List the keys as deep as a wrong one, of the configuration that the command's valid group choices compose."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf

    def keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
        for key in map(str, node):
            yield f"{prefix}{key}"
            if not OmegaConf.is_missing(node, key) and OmegaConf.is_dict(child := node._get_node(key)):
                yield from keys(child, f"{prefix}{key}.")  # type: ignore[arg-type]

    GlobalHydra.instance().clear()
    groups = [argument for argument in sys.argv[1:] if re.fullmatch(r"[a-z_]+=[\w-]+", argument)]
    with initialize_config_module(_ELSEWHERE.get(config_name, "mlpmatch_pl.conf"), version_base="1.3"):
        for overrides in (groups, []):
            try:
                return [key for key in keys(compose(config_name, overrides)) if key.count(".") == wrong.count(".")]
            except HydraException:
                continue
    return []
