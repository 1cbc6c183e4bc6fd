"""Hand-over to the lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), with local task files.

The bundled tasks, 120 questions written for this project, need no network: they are a smoke alarm for forgetting, not
a benchmark to publish.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.evaluate.ledger import Item
from megatron_mixcpt.evaluate.loading import load_directory
from megatron_mixcpt.huggingface.gguf import gguf_file

if TYPE_CHECKING:  # an optional package
    from lm_eval.tasks import TaskManager

BUNDLED = Path(__file__).parent / "tasks"
RIGHT = ("acc", "exact_match")  # metrics that are 0 or 1 for a question, the first that a task has is taken
GROUPS = ("skill", "source", "subject", "category")  # keys of a question that say what it belongs to


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task; `stderr` is None where the harness has no estimate."""

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool


def bundled_tasks() -> list[str]:
    """Names of the tasks that come with the package."""
    return sorted(path.stem for path in BUNDLED.glob("*.yaml"))


def resolve_task(task: str) -> str | dict[str, Any]:
    """A bundled task's name or a YAML file -> its definition with absolute data files; other names are the harness's.

    Raises:
        ConfigError: a file that is missing or is no task definition.
    """
    path = BUNDLED / f"{task}.yaml" if task in bundled_tasks() else Path(task)
    if path.suffix not in (".yaml", ".yml"):
        return task
    try:
        definition = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"--tasks: {path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--tasks: {path}: not plain YAML (functions are not supported here): {error}") from error
    if not isinstance(definition, dict) or "task" not in definition:
        raise ConfigError(f"--tasks: {path}: has no key `task`, so it is no task of the lm-evaluation-harness")
    settings = definition.get("dataset_kwargs", {})
    if "data_files" in settings:
        settings["data_files"] = _resolved(settings["data_files"], path.parent)
    return definition


def _resolved(files: Any, folder: Path) -> Any:
    """`data_files` as datasets takes them, a name, a list or {split: either}, with absolute names of what is there."""
    if isinstance(files, dict):
        return {split: _resolved(value, folder) for split, value in files.items()}
    if isinstance(files, list):
        return [_resolved(name, folder) for name in files]
    return str((folder / files).resolve()) if isinstance(files, str) and (folder / files).exists() else files


def data_files(task: str) -> list[Path]:
    """Files on this machine that a task's questions are in. Raises ConfigError as `resolve_task`."""
    resolved = resolve_task(task)
    files = {} if isinstance(resolved, str) else resolved.get("dataset_kwargs", {}).get("data_files", {})
    values = files.values() if isinstance(files, dict) else [files]
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return [Path(name) for name in names if isinstance(name, str) and Path(name).is_file()]


def require_harness() -> None:
    """Raise ConfigError unless the harness is installed."""
    if find_spec("lm_eval") is None:
        raise ConfigError("--tasks needs the lm-evaluation-harness: in the clone, pip install -e '.[eval]'")


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise ConfigError unless the harness is installed and every task is bundled, a task file, or one of its own."""
    require_harness()
    names = [task for task in tasks if task != "bundled" and isinstance(resolve_task(task), str)]
    if names:
        manager = _task_manager(with_harness_tasks=True)
        for name in names:
            if not manager.match_tasks([name]):
                raise ConfigError(_unknown(name))


def run_harness(
    hf_dir: Path,
    tasks: Sequence[str],
    *,
    limit: int | None,
    dtype: str,
    done: Callable[[int], None] = lambda tasks: None,
) -> tuple[list[TaskScore], list[Item]]:
    """Score the model of a Hugging Face directory or of what `load_directory` opens beside, task by task.

    Returns the scores, and the questions of those tasks whose answers are right or wrong (RIGHT).

    `done` is called with the number of tasks that have been scored.

    Raises:
        ConfigError: the harness is not installed, or does not know a task.
    """
    from megatron_mixcpt.hf_alora import is_alora

    require_harness()
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM

    from megatron_mixcpt.runtime.devices import cuda_devices

    device = "cuda" if cuda_devices() else "cpu"
    precision = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    resolved = [resolve_task(task) for task in tasks]
    if is_alora(hf_dir) or gguf_file(hf_dir) is not None:
        opened, tokenizer = load_directory(hf_dir, dtype=getattr(torch, precision))
        model = HFLM(pretrained=opened.to(device), tokenizer=tokenizer, batch_size=8)
    else:
        model = HFLM(pretrained=str(hf_dir), dtype=precision, device=device, batch_size=8)
    manager = _task_manager(with_harness_tasks=any(isinstance(task, str) or "include" in task for task in resolved))
    scores: list[TaskScore] = []
    items: list[Item] = []
    for task in resolved:
        try:
            output = lm_eval.simple_evaluate(
                model=model,
                tasks=[task],
                task_manager=manager,
                limit=limit,
                bootstrap_iters=0,
                random_seed=0,
                numpy_random_seed=0,
                torch_random_seed=0,
                fewshot_random_seed=0,
                log_samples=True,
            )
        except KeyError as error:
            raise ConfigError(_unknown(str(error))) from error
        scores += _scores(output)
        items += [item for name, samples in output["samples"].items() for item in _items(name, samples)]
        done(1)
    return scores, items


def _unknown(task: str) -> str:
    return f"--tasks: the harness does not know {task}; bundled: {', '.join(bundled_tasks())}"


@cache
def _task_manager(*, with_harness_tasks: bool) -> TaskManager:
    """Finding the harness's own thousands of task files takes seconds: once a process, and only where one is needed."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=with_harness_tasks)


def _scores(output: dict[str, Any]) -> list[TaskScore]:
    """What the harness reports, without its estimates of errors as metrics of their own."""
    scores = []
    groups = {name for name, members in output.get("group_subtasks", {}).items() if members}  # counted by their members
    for task, results in output["results"].items():
        if task in groups:
            continue
        better = output["higher_is_better"].get(task, {})
        for key, value in results.items():
            metric, _, variant = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or not variant:
                continue
            stderr = results.get(f"{metric}_stderr,{variant}")
            known = stderr if isinstance(stderr, float) else None
            name = metric if variant == "none" else f"{metric} ({variant})"  # of several filters, as gsm8k has them
            scores.append(TaskScore(task, name, float(value), known, better.get(metric, True)))
    return scores


def _items(task: str, samples: Sequence[dict[str, Any]]) -> list[Item]:
    """The questions of a task, if it has one of the metrics RIGHT; one for each, whatever filters there are."""
    metric = next((name for name in RIGHT if samples and name in samples[0]), None)
    if metric is None:
        return []
    first = samples[0].get("filter")
    return [_item(task, sample, bool(sample[metric])) for sample in samples if sample.get("filter") == first]


def _item(task: str, sample: dict[str, Any], right: bool) -> Item:
    doc, said = sample["doc"], sample["filtered_resps"]
    group = next((str(doc[key]) for key in GROUPS if isinstance(doc.get(key), str)), task)
    question, texts = str(sample["arguments"][0][0]), [str(arguments[1]).strip() for arguments in sample["arguments"]]
    number = str(sample["doc_id"])
    if not isinstance(said[0], Sequence) or isinstance(said[0], str):  # it wrote an answer
        return Item(task, group, number, question, str(sample["target"]), str(said[0]), right)
    likely = [float(loglikelihood) for loglikelihood, _ in said]
    best, *others = sorted(range(len(likely)), key=lambda place: -likely[place])
    target = sample["target"]
    expected = texts[int(target)] if str(target).isdigit() and int(target) < len(texts) else str(target)
    sure = likely[best] - likely[others[0]] if others else likely[best]
    return Item(task, group, number, question, expected, texts[best], right, sure, 1 / len(texts) if others else 0.0)
