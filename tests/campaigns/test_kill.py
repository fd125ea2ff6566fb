import json
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parent / "kill.py"


@pytest.mark.slow
def test_killed_runs_end_like_an_undisturbed_run(tmp_path):
    """SIGKILL at random times, every second time while a checkpoint is being written."""
    out = tmp_path / "kill.json"
    command = [sys.executable, CAMPAIGN, "--kills", "3", "--out", out, "--keep", tmp_path / "runs"]
    done = subprocess.run(
        [*map(str, command), "loader.num_workers=0", "schedule.steps=20"], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert result["kills"] >= 3
    assert result["kills_while_writing"] >= 1
    assert result["differences"] == []
    assert result["starts"] == result["kills"] + result["runs"]
