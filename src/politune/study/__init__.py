"""A study: arms x seeds, each trained and measured by the same plain commands that a person would type, compared in one report.

`spec` reads what is to be done; `work` does what nobody has done yet, one run at a time and each in a process of its own;
`results` compares; `slurm` writes the same work as an array job.
"""
