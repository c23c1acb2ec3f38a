"""A study as a Slurm array: a job for each run. Whichever comes last writes the whole report."""

import shlex
import sys
from pathlib import Path

from politune.study.spec import shipped_names

SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=politune
#SBATCH --array=0-{last}
#SBATCH --output="{log}/slurm-%A-%a.log"
#SBATCH --chdir="{here}"
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
# What your cluster asks for (--partition, --gres=gpu:1, --time, --mem) goes here, or on sbatch's command line; give it ten
# minutes or more. Two minutes before the time is up the run saves itself and the job is queued again; a job that the cluster
# takes off and queues again goes on likewise.
{command} --run "$SLURM_ARRAY_TASK_ID" &
run=$!
trap : TERM
trap 'late=yes; kill -TERM "$run"' USR1
until wait "$run"; code=$?; ! kill -0 "$run" 2>/dev/null; do :; done
if [ "$late" ] && [ "$code" = 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""


def script(study: str, output: Path, runs: int, *, offline: bool) -> str:
    """The script for sbatch, wherever it is called.

    Args:
        study: a shipped study, or a file.
        output: the study's directory, which every node sees.
        runs: how many there are.
    """
    place = study if study in shipped_names() else str(Path(study).expanduser().absolute())
    words = [sys.executable, "-m", "politune", "study", place]
    command = shlex.join([*words, "-o", str(output.absolute()), *(["--offline"] if offline else [])])
    return SCRIPT.format(last=runs - 1, log=str(output.absolute()).replace("%", "%%"), here=Path.cwd(), command=command)
