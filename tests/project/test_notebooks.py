"""The notebooks run, and their stored outputs are complete, small and free of local paths.

``python tests/project/test_notebooks.py [NAME ...]`` runs them and stores their outputs; then look at the pictures.
"""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.util import run_sync

FOLDER, TESTS = Path(__file__).parents[2] / "notebooks", Path(__file__).parents[1]
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PICTURES = ("image/png", "image/jpeg")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
LARGEST = 200_000  # bytes
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def client_of(path: Path, folder: Path, kernel: AsyncKernelManager | None = None) -> NotebookClient:
    """Return what runs a notebook in a folder and raises the error of a cell with its code and traceback."""
    notebook = nbformat.read(path, as_version=4)
    options = {"resources": {"metadata": {"path": str(folder)}}, "record_timing": False, "coalesce_streams": True}
    return NotebookClient(notebook, kernel, timeout=300, kernel_name="python3", **options)


def outputs(notebook: Any) -> Iterator[Any]:
    for cell in notebook.cells:
        yield from cell.get("outputs", [])


def store(path: Path) -> None:
    """Run a notebook and store its outputs, each picture in the smaller of its encodings."""
    with tempfile.TemporaryDirectory() as folder:
        notebook = client_of(path, Path(folder)).execute()
    for output in outputs(notebook):
        encodings = sorted(set(PICTURES) & set(output.get("data", ())), key=lambda kind: len(output["data"][kind]))
        for larger in encodings[1:]:
            del output["data"][larger]
    notebook.metadata = nbformat.from_dict(METADATA)
    nbformat.write(notebook, path)


SHORT = [(r"(steps=)\d\d+", r"\g<1>9"), (r"(max_epochs=)\d", r"\g<1>1")]
PREPARE = """
%reset -f
import os, subprocess
os.chdir({folder!r})
from helpers.notebook_commands import run_here
subprocess.run = run_here
%reset -f
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """One kernel for all notebooks: importing takes longer than their code."""
    manager, environment = AsyncKernelManager(), {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    run_sync(manager.start_kernel)(env={**os.environ, **environment}, cwd=str(tmp_path_factory.mktemp("kernel")))
    yield manager
    run_sync(manager.shutdown_kernel)(now=True)


@pytest.mark.slow
@every_notebook
def test_a_notebook_runs_and_leaves_no_files(path, tmp_path, kernel):
    """With shorter trainings, and with the commands in the kernel's process."""
    client = client_of(path, tmp_path, kernel)
    for cell in client.nb.cells:
        for long, short in SHORT if cell.cell_type == "code" else ():
            cell.source = re.sub(long, short, cell.source)
    client.nb.cells.insert(0, nbformat.v4.new_code_cell(PREPARE.format(folder=str(tmp_path))))
    executed = client.execute()
    assert list(tmp_path.iterdir()) == []
    errors = [output.text for output in outputs(executed) if output.get("name") == "stderr"]
    assert errors == []
    shown = [picture_count(notebook) for notebook in (executed, nbformat.read(path, as_version=4))]
    assert shown[0] == shown[1]


def picture_count(notebook: Any) -> int:
    kinds = {*PICTURES, "image/svg+xml"}
    return sum(bool(kinds & set(output.get("data", ()))) for output in outputs(notebook))


@every_notebook
def test_the_stored_outputs_are_complete_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size <= LARGEST
    assert picture_count(notebook) or path.stem == "4_another_project"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # stored by one run
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs(notebook))


@every_notebook
def test_the_stored_outputs_have_no_local_paths(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata == METADATA
    assert not any(cell.metadata for cell in notebook.cells)
    for output in outputs(notebook):
        texts = [output.get("text", ""), *(text for kind, text in output.get("data", {}).items() if "text" in kind)]
        for text in texts:
            assert not re.search(r"(?<![\w.:/])/(?:\w|\.)[\w.-]*/|[A-Z]:\\|\x1b", text), text


def test_the_readme_lists_all_notebooks():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[(\w+)\]\(\1\.ipynb\) \|", text, re.M) == [path.stem for path in NOTEBOOKS]
    assert len(NOTEBOOKS) == 5


if __name__ == "__main__":
    for notebook_path in NOTEBOOKS:
        if notebook_path.stem in sys.argv[1:] or not sys.argv[1:]:
            store(notebook_path)
