import importlib

import pytest


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run a command's main in this process and in `tmp_path`; return its exit code, output and errors."""

    def run(name: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("MLPMATCH_STAMP", "stamp")
        monkeypatch.setattr("sys.argv", [name, *arguments])
        code = 0
        try:
            importlib.import_module(f"mlpmatch_pl.{name}").main()
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return run
