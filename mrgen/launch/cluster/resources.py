"""What a job needs of a cluster's nodes, by its trainer, and whether a partition has such nodes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from mrgen.errors import UserError
from mrgen.launch.cluster.slurm import ask
from mrgen.launch.ranks import is_estimator

__all__ = ["Node", "Resources", "check_partition", "checked_settings", "derive", "partitions", "whole"]

# Options of sbatch that follow from the trainer or have a key of their own.
DERIVED = {
    "array": "array_parallelism",
    "constraint": "constraint",
    "cpus-per-task": "cpus_per_task",
    "gpus": "gpus_per_node",
    "gpus-per-node": "gpus_per_node",
    "gpus-per-task": "gpus_per_node",
    "mem": "mem_gb",
    "nodes": "nodes",
    "ntasks": "tasks_per_node",
    "ntasks-per-node": "tasks_per_node",
    "partition": "partition",
    "signal": "signal_delay_s",
    "time": "timeout_min",
}
KEYS = {
    *("partition", "account", "qos", "constraint", "gpu_type", "setup", "additional_parameters", "name"),
    *("timeout_min", "signal_delay_s", "mem_gb", "cpus_per_task", "array_parallelism"),
    *("nodes", "tasks_per_node", "gpus_per_node"),
}


@dataclass(frozen=True)
class Resources:
    """What SLURM is asked for; jobs that need the same share an array.

    Attributes:
        nodes: number of nodes.
        tasks_per_node: processes of each, one for each device.
        cpus_per_task: processors of a process and its loaders.
        gpus_per_node: 0 where the job trains on processors.
        mem_gb: memory of a node, in GiB; 0: what the site gives.
    """

    nodes: int
    tasks_per_node: int
    cpus_per_task: int
    gpus_per_node: int
    mem_gb: float


@dataclass(frozen=True)
class Node:
    """A kind of node of a partition, as sinfo describes it.

    Attributes:
        cpus: processors.
        mem_gb: memory, in GiB.
        gpus: number of GPUs by type; "" where the site names none.
        count: how many the partition has.
        minutes: longest time of a job there; None: no limit.
    """

    cpus: int
    mem_gb: float
    gpus: Mapping[str, int]
    count: int
    minutes: float | None


def derive(conf: DictConfig, settings: Mapping[str, Any]) -> Resources:
    """A job's resources from its config, and what the user set beside it.

    Args:
        conf: the job's composed config.
        settings: keys of ``conf/hydra/launcher/slurm.yaml``.

    Raises:
        UserError: the two contradict each other.
    """
    trainer = conf.trainer
    devices, nodes = trainer.devices, trainer.get("num_nodes", 1)
    accelerator = trainer.get("accelerator", "auto")
    if is_estimator(conf.model):  # whatever the trainer says
        devices, nodes, accelerator = 1, 1, "cpu"
    if not str(devices).isdecimal() or int(devices) < 1:
        raise UserError(
            f"trainer.devices={devices}: a job of SLURM asks for a number of devices on each node; expected 1, 2, …"
        )
    tasks = int(devices)
    gpus = tasks if accelerator in ("auto", "gpu", "cuda") else 0
    follows = {"nodes": whole("trainer.num_nodes", nodes), "tasks_per_node": tasks, "gpus_per_node": gpus}
    for key, value in follows.items():
        if settings.get(key) is not None and settings[key] != value:
            raise UserError(
                f"hydra.launcher.{key}={settings[key]}: the trainer needs {value} (trainer.devices={devices} "
                f"trainer.num_nodes={nodes} trainer.accelerator={accelerator}); change the trainer, and leave "
                f"hydra.launcher.{key} out"
            )
    workers = whole("data.workers", conf.data.get("workers", 0), 0)
    memory = settings.get("mem_gb")
    return Resources(
        **follows,
        cpus_per_task=settings.get("cpus_per_task") or workers + 1,
        mem_gb=tasks * (8 + 2 * workers) if memory is None else memory,
    )


def whole(key: str, value: Any, least: int = 1) -> int:
    """The value of a key. Raises UserError where it is no whole number, or less than the least."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{key}={value}: expected a whole number from {least} on")
    return value


def checked_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, names that look like numbers as text.

    Raises:
        UserError: some mean nothing or contradict themselves, whatever the job.
    """
    for key in settings:
        if key not in KEYS:
            raise UserError(
                f"hydra.launcher.{key}: found no such key; options of sbatch go to "
                f"hydra.launcher.additional_parameters: '+hydra.launcher.additional_parameters.{key}=…'"
            )
    for key in ("timeout_min", "signal_delay_s", "array_parallelism", "cpus_per_task", "mem_gb"):
        value = settings[key]
        unset = value is None and key in ("cpus_per_task", "mem_gb")
        if not (unset or (key == "mem_gb" and isinstance(value, int | float) and value >= 0)):
            whole(f"hydra.launcher.{key}", value)
    names: dict[str, str | None] = {}
    for key in ("partition", "account", "qos", "constraint", "gpu_type"):
        value = settings[key]
        if not (value is None or isinstance(value, str | int)):
            raise UserError(
                f"hydra.launcher.{key}={value}: expected a name; several partitions are written "
                "'hydra.launcher.partition=\"gpu,long\"'"
            )
        names[key] = None if value is None else str(value)
    for key, kind, example in (
        ("setup", list, "[module load cuda]"),
        ("additional_parameters", dict, "{comment: mine}"),
    ):
        if not isinstance(settings[key], kind):
            raise UserError(f"hydra.launcher.{key}={settings[key]}: expected the like of {example}")
    minutes, delay = settings["timeout_min"], settings["signal_delay_s"]
    if delay >= 60 * minutes:
        raise UserError(
            f"hydra.launcher.signal_delay_s={delay}: the job would be told to save before it begins; expected fewer "
            f"seconds than hydra.launcher.timeout_min={minutes} has, {60 * minutes}"
        )
    for option in settings["additional_parameters"]:
        name = str(option).replace("_", "-")
        if name in DERIVED:
            raise UserError(
                f"hydra.launcher.additional_parameters.{option}: has a key of its own, hydra.launcher.{DERIVED[name]}"
            )
    return {**settings, **names}


def partitions() -> dict[str, list[Node]] | None:
    """The nodes of every partition, the default one's under "" as well; None where sinfo does not answer."""
    answer = ask("sinfo", "--all", "--exact", "--noheader", "--format=%P|%c|%m|%G|%D|%l")
    if answer is None:
        return None
    found: dict[str, list[Node]] = {}
    for line in answer.splitlines():
        name, cpus, megabytes, gres, count, limit = line.split("|")
        gpus = {kind: int(number) for kind, number in re.findall(r"\bgpu(?::([^:,()]+))?:(\d+)", gres)}
        node = Node(_number(cpus), _number(megabytes) / 1024, gpus, _number(count), _minutes(limit))
        found.setdefault(name.rstrip("*"), []).append(node)
        if name.endswith("*"):
            found.setdefault("", []).append(node)
    return found


def _number(text: str) -> int:
    return int(text.rstrip("+KMGT") or 0)


def _minutes(limit: str) -> float | None:
    """``1-12:30:00``, ``30:00`` or ``infinite`` as SLURM writes it."""
    days, _, clock = limit.rpartition("-")
    if not re.fullmatch(r"[\d:]+", clock):
        return None
    seconds = 0
    for part in clock.split(":"):
        seconds = 60 * seconds + int(part)
    return 1440 * int(days or 0) + seconds / 60


def check_partition(
    needed: Resources, known: Mapping[str, Sequence[Node]], *, partition: str, gpu_type: str | None, minutes: float
) -> None:
    """Raises UserError where no node of the partition could ever run the job, which SLURM would keep waiting.

    Args:
        needed: the job's resources.
        known: nodes by partition.
        partition: name, several names with commas between them, or "" for the default one.
        gpu_type: which of its GPUs are counted; None: all.
        minutes: time that the job asks for.
    """
    names = [name.strip() for name in partition.split(",")]
    for name in names:
        if name and name not in known:
            there = ", ".join(sorted(other for other in known if other))
            raise UserError(f"hydra.launcher.partition={name}: found no such partition; sinfo names {there}")
    nodes = [node for name in names for node in known.get(name, ())]
    if not nodes:
        return  # no default partition: sbatch says what the site wants instead
    where = f"partition {partition}" if partition else "the default partition"
    cpus, gpus = needed.tasks_per_node * needed.cpus_per_task, needed.gpus_per_node
    kind = f"GPUs of type {gpu_type}" if gpu_type else "GPUs"

    def of(node: Node) -> int:
        return node.gpus.get(gpu_type, 0) if gpu_type else sum(node.gpus.values())

    if gpus > (most := max(of(node) for node in nodes)):
        raise UserError(
            f"the job needs {gpus} {kind} on a node, and the nodes of {where} have {most}; expected another "
            "hydra.launcher.partition, fewer trainer.devices, or trainer.accelerator=cpu"
        )
    if cpus > (most := max(node.cpus for node in nodes)):
        raise UserError(
            f"the job needs {cpus} processors on a node ({needed.tasks_per_node} tasks with {needed.cpus_per_task} "
            f"each), and the nodes of {where} have {most}; lower data.workers or hydra.launcher.cpus_per_task"
        )
    if needed.mem_gb > (memory := max(node.mem_gb for node in nodes)):
        raise UserError(
            f"the job needs {needed.mem_gb:g} GB of memory on a node, and the nodes of {where} have {memory:.1f}; set "
            "hydra.launcher.mem_gb (0: what the site gives), or lower data.workers"
        )
    fitting = [n for n in nodes if of(n) >= gpus and n.cpus >= cpus and n.mem_gb >= needed.mem_gb]
    if needed.nodes > (count := sum(node.count for node in fitting)):
        raise UserError(
            f"the job needs {needed.nodes} nodes with {cpus} processors, {gpus} {kind} and {needed.mem_gb:g} GB each, "
            f"and {where} has {count} of that kind"
        )
    limits = [node.minutes for node in fitting]
    if None not in limits and minutes > (longest := max(limit for limit in limits if limit is not None)):
        raise UserError(
            f"hydra.launcher.timeout_min={minutes:g}: {where} ends jobs after {longest:g} minutes; set that, and a "
            "longer run is queued again and goes on"
        )
