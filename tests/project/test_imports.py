import subprocess
import sys
from pathlib import Path

import pytest

import mlpmatch_pl

ROOT = Path(__file__).parents[2]


def test_importing_the_package_is_light():
    code = "import sys, mlpmatch_pl; mlpmatch_pl.UserError; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "mlpmatch_pl" in loaded
    assert not {*loaded} & {"torch", "numpy", "lightning", "hydra", "omegaconf", "wandb", "albumentations", "pydantic"}


@pytest.mark.parametrize("name", mlpmatch_pl.__all__)
def test_every_public_name_exists_and_is_documented(name):
    thing = getattr(mlpmatch_pl, name)
    assert isinstance(thing, str) or thing.__doc__


def test_dir_lists_the_public_names_and_no_others():
    assert dir(mlpmatch_pl) == sorted(mlpmatch_pl.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'MLPMach'"):
        mlpmatch_pl.MLPMach  # noqa: B018


def test_an_unknown_name_fails_the_type_check(tmp_path):
    from mypy import api

    names = ", ".join(f"mlpmatch_pl.{name}" for name in mlpmatch_pl.__all__)
    (tmp_path / "right.py").write_text(f"import mlpmatch_pl\n{names}\n")
    (tmp_path / "wrong.py").write_text("import mlpmatch_pl\nmlpmatch_pl.MLPMach\n")
    package = str(ROOT / "src/mlpmatch_pl/__init__.py")
    files = [package, str(tmp_path / "right.py"), str(tmp_path / "wrong.py")]
    options = ["--cache-dir=/dev/null", "--follow-imports=skip", "--ignore-missing-imports"]  # without torch: fast
    printed, _, code = api.run([*options, *files])
    assert code == 1
    assert printed.count("error:") == 1
    assert 'wrong.py:2: error: Module has no attribute "MLPMach"' in printed


def test_albumentations_is_the_mit_release():
    from importlib.metadata import distributions

    names = {distribution.name.lower() for distribution in distributions()}
    assert "albumentations" in names
    assert "albumentationsx" not in names
