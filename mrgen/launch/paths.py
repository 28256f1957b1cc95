"""Where the configuration lies: the checkout's ``conf/`` where there is one, the packaged copy otherwise."""

from pathlib import Path

__all__ = ["CONF_DIR"]

_package = Path(__file__).resolve().parents[1]
_checkout = _package.parent / "conf"
# An editable install copies conf/ into site-packages once; the checkout's is the one that people edit.
CONF_DIR = _checkout if (_package.parent / "pyproject.toml").is_file() and _checkout.is_dir() else _package / "conf"
