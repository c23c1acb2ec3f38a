"""A study as a Slurm array: a job for each run. Whichever comes last writes the report."""

import shlex

HEADER = """\
#!/bin/bash
#SBATCH --job-name=politune
#SBATCH --array=0-{last}
#SBATCH --output="{output}/slurm-%A-%a.log"
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
# What your cluster asks for (--partition, --gres=gpu:1, --time, --mem) goes here, or on sbatch's command line.
# Two minutes before the time is up the run saves itself; the same job, queued again, goes on from there.
"""


def script(study: str, output: str, runs: int, *, offline: bool) -> str:
    """The script for sbatch.

    Args:
        study: as it was given to the command.
        output: the study's directory, which every node sees.
        runs: how many there are.
    """
    words = ["politune", "study", study, "-o", output, *(["--offline"] if offline else [])]
    return HEADER.format(last=runs - 1, output=output) + f'exec {shlex.join(words)} --run "$SLURM_ARRAY_TASK_ID"\n'
