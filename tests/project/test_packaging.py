import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import TINY

ROOT = Path(__file__).parents[2]


def test_the_package_list_names_every_folder():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {
        path.parent.relative_to(ROOT / "src").as_posix().replace("/", ".") for path in ROOT.glob("src/**/__init__.py")
    }
    assert set(listed) == folders | {"mlpmatch_pl.conf"}


def test_every_bound_has_a_reason():
    text = (ROOT / "pyproject.toml").read_text()
    dependencies = text.split("dependencies = [")[1].split("]\n\n")[0]
    for line in dependencies.strip().splitlines():
        assert "#" in line, line


def test_the_citation_names_the_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.slow
def test_a_built_wheel_works_in_a_fresh_environment_and_another_folder(tmp_path):
    def run(*command: str, **options):
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, **options).stdout

    run(sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "dist"), str(ROOT))
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    # The heavy dependencies are borrowed from this environment; the package itself comes from the wheel alone.
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv"))
    python = str(tmp_path / "venv" / "bin" / "python")
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    borrowed = Path(find_spec("torch").origin).parents[1]
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    (site / "borrowed.pth").write_text(f"{borrowed}\n")

    (tmp_path / "elsewhere").mkdir()
    where = run(python, "-c", "import mlpmatch_pl; print(mlpmatch_pl.__file__)", cwd=tmp_path / "elsewhere")
    assert Path(where.strip()).is_relative_to(site)
    shown = run(python, "-m", "mlpmatch_pl.train", "--cfg", "job", cwd=tmp_path / "elsewhere")
    assert "mlpmatch_pl.data.datasets.shapes.shapes" in shown
    script = str(tmp_path / "venv" / "bin" / "mlpmatch")
    assert run(script, cwd=tmp_path / "elsewhere").startswith("Usage: mlpmatch COMMAND")
    run(script, "train", *TINY, "schedule.steps=1", "hydra.run.dir=run", cwd=tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "run" / "metrics.json").is_file()
    assert (site / "mlpmatch_pl" / "py.typed").is_file()
