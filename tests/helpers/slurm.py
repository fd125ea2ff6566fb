"""A SLURM cluster of one machine, in place of the commands that submitit calls: jobs start at once, a task each."""

import os
import sys
from pathlib import Path

JOB = "4711"
COMMANDS = {
    # A batch script, or an array of them. submitit moves the script afterwards, so it is passed as text.
    "sbatch": f"""
import os, re, subprocess, sys
script = open(sys.argv[1]).read()
array = re.search(r"^#SBATCH --array=0-(\\d+)", script, re.M)
for task in range(int(array[1]) + 1 if array else 1):
    own = {{"SLURM_ARRAY_JOB_ID": "{JOB}", "SLURM_ARRAY_TASK_ID": str(task)}} if array else {{}}
    job = {{
        "SLURM_JOB_ID": str({JOB} + task), "SLURM_JOB_NAME": "train", "SLURM_JOB_NUM_NODES": "1", "SLURM_NNODES": "1",
        "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NODELIST": "127.0.0.1",
        "SLURM_NODELIST": "127.0.0.1",
    }}
    subprocess.Popen(
        ["bash", "-c", script], env={{**os.environ, **job, **own}}, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )
print("Submitted batch job {JOB}")
""",
    # One task of the job.
    "srun": f"""
import os, sys
options = sys.argv[1:sys.argv.index("-u") - 1]
job = "{JOB}" + ("_" + os.environ["SLURM_ARRAY_TASK_ID"] if "SLURM_ARRAY_TASK_ID" in os.environ else "")
for stream, option in ((1, "--output"), (2, "--error")):
    path = options[options.index(option) + 1]
    path = path.replace("%A_%a", job).replace("%j", job).replace("%t", "0")
    os.makedirs(os.path.dirname(path), exist_ok=True)  # submitit makes the folder once sbatch has returned
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
os.environ |= {{"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}}
os.execv(sys.argv[len(options) + 1], sys.argv[len(options) + 1:])
""",
    # Accounting that never knows anything: submitit then waits for the results.
    "sacct": """
print("JobID|State|NodeList")
""",
}


def fake_slurm(folder: Path) -> str:
    """Write the commands into a folder; returns a PATH on which they are found first."""
    folder.mkdir()
    for name, code in COMMANDS.items():
        path = folder / name
        path.write_text(f"#!{sys.executable}{code}", encoding="utf-8")
        path.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"
