"""``offsite task check``: a task file is sound, and what a model would read of it."""

from __future__ import annotations

from offsite.artefacts.job import task_at
from offsite.console import say
from offsite.tasks.config import TaskCheckConfig
from offsite.tasks.rows import read_task_rows
from offsite.tasks.task import told


def run(config: TaskCheckConfig) -> dict[str, object]:
    """Carry out ``offsite task check``; nothing is loaded.

    Raises:
        ConfigError, DataError: saying everything that is wrong with the file, or with a row of the data.
        ArtefactError: when a job is rejected.
    """
    task = task_at(config.task)
    rows = read_task_rows(config.data, task, fields=config.fields) if config.data else []
    for name, value in told(task):
        say(f"  {name}: {value}")
    if config.data:
        say(f"  rows: {len(rows)}, each with the task's fields and an answer of its form")
    if task.samples:
        first = task.samples[0]
        prompt = task.introduced(task.asked(first.vars))
        say("a model reads, of the first sample:")
        for line in f"{prompt}{task.led(prompt)}[{task.spelled(first.answer)}]".splitlines():
            say(f"  | {line}")
    return {
        "task": task.name,
        "task_digest": task.digest,
        "fields": list(task.fields),
        "answer": task.answer.type,
        "measure": task.measure,
        "num_prompts": len(task.prompts),
        "num_samples": len(task.samples),
        "num_tests": len(task.tests),
        "num_rows": len(rows),
    }
