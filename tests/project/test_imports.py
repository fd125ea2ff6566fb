import subprocess
import sys

import pytest

import mlpmatch_pl


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_package_is_light():
    assert not loaded_after("import mlpmatch_pl") & {
        "torch",
        "lightning",
        "hydra",
        "omegaconf",
        "wandb",
        "albumentations",
    }


def test_module_and_data_module_pull_in_neither_hydra_nor_albumentations_nor_touch_the_network():
    loaded = loaded_after(  # timm itself imports wandb where it is installed
        "import socket\n"
        "def refuse(*args, **kwargs): raise AssertionError('network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from mlpmatch_pl import MLPMatch, SemiSupervisedDataModule\n"
    )
    assert not loaded & {"hydra", "omegaconf", "albumentations"}


def test_the_command_starts_without_heavy_imports():
    assert not loaded_after("import mlpmatch_pl.train") & {"torch", "lightning", "wandb", "albumentations"}


@pytest.mark.parametrize("name", mlpmatch_pl.__all__)
def test_every_public_name_is_there_and_documented(name):
    thing = getattr(mlpmatch_pl, name)
    assert isinstance(thing, str) or thing.__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'MLPMach'"):
        mlpmatch_pl.MLPMach  # noqa: B018


def test_albumentations_is_the_mit_release():
    from importlib.metadata import distributions

    names = {distribution.name.lower() for distribution in distributions()}
    assert "albumentations" in names
    assert "albumentationsx" not in names
