"""Five published systems that synthesise brain MRI, on one bench."""

import os

__version__ = "0.1.0"

# Read by OpenMP when torch is loaded. Its threads otherwise spin at every barrier, and a single other process on the
# same cores then slows a training step several times over.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
