"""SLURM: what a trainer asks for, submission, and waiting for jobs."""
