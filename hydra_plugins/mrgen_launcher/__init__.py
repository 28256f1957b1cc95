"""Hydra looks for launchers here and nowhere else; what this one does lies in ``mrgen.launch.cluster.submission``."""
