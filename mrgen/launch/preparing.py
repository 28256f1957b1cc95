"""What ``mrgen-prepare`` does: grow the phantom where the cohort is one, check, prepare, report."""

import sys
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from mrgen.data.layouts import Layout, read_layouts
from mrgen.data.phantom import grow_cohort
from mrgen.data.preparation import Report, prepare_cohort, render
from mrgen.errors import UserError
from mrgen.launch.instantiate import plain
from mrgen.launch.paths import CONF_DIR

__all__ = ["prepare"]


def prepare(conf: DictConfig) -> Report:
    """Prepares the cohort of ``conf.data``.

    Args:
        conf: composed config of ``conf/prepare.yaml``.

    Returns:
        What was done. The process ends with exit code 1 where subjects were left out and ``strict`` holds, and where
        none is good.
    """
    # The other keys of the group are training's, and may refer to what only mrgen-train composes.
    data = {key: plain(conf.data.get(key)) for key in ("root", "store", "layout", "modalities", "phantom")}
    if not data.get("root"):
        if conf.data.get("name") == "synthetic":
            raise UserError(
                "data=synthetic: there is nothing to prepare; mrgen-synthesize writes such a cohort as a store, with a "
                "generator's checkpoint: mrgen-synthesize checkpoint=RUN output=STORE"
            )
        raise UserError("data.root is not set; give the folder of the raw cohort: data.root=/data/…")
    if not data.get("layout"):
        raise UserError("data.layout is not set; give the cohort's table of patterns: data.layout=my_cohort.yaml")
    if conf.workers is not None and (type(conf.workers) is not int or conf.workers < 0):
        raise UserError(f"workers is {conf.workers}; expected a whole number from 0 on, or null")
    layout = Layout.from_conf(data["layout"])
    root = Path(data["root"]).expanduser()
    store = Path(data["store"]).expanduser()
    if {store.resolve(), *store.resolve().parents} & {root.resolve()} or store.resolve() in root.resolve().parents:
        raise UserError(
            f"data.store={store} and data.root={root} lie in one another; the store needs a folder of its own"
        )
    if (phantom := data.get("phantom")) and not conf.check:  # a check writes nothing
        grow_cohort(root, layout=layout.name, sequences=data["modalities"], workers=conf.workers, **phantom)
    report = prepare_cohort(
        layout,
        root,
        None if conf.check else store,
        modalities=data["modalities"],
        workers=conf.workers,
        check=conf.check,
        strict=conf.strict,
        prune=conf.prune,
        verify=conf.verify,
        known_layouts=read_layouts(CONF_DIR / "data" / "layout"),
    )
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(render(report), soft_wrap=True)
    if report.store is not None:
        print(f"store: {report.store}")
    if report.exit_code:
        sys.exit(report.exit_code)
    return report
