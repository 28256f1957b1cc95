"""Five published systems that synthesise brain MRI, on one bench."""

__version__ = "0.1.0"
