"""Tasks that are served: the prompt of an input, and answers held to the task's form and checked before they are sent.

Where the extra ``structured`` is installed an answer is written under the form's grammar; otherwise freely. Either way
what was written is checked, once more drawn when it has not the form, and refused when it has not then either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from offsite.console import say
from offsite.tasks.forms import FreeText, JsonForm, label_in, object_in, up_to
from offsite.tasks.task import Answer, Task
from offsite.tasks.templates import Value
from server.serving.grammar import Grammar, Grammars
from server.serving.protocol import ApiError, CompletionAsk, TaskAsk

NUM_TRIES = 2
_TEMPERATURE = 0.7  # of the second try: the first takes the likeliest token each time
_BYTES_OF_LABEL = 4  # a character is at most so many tokens


@dataclass(frozen=True)
class Question:
    """An input of a task, as a request gave it."""

    task: Task
    vars: Mapping[str, Value] = field(repr=False)

    @property
    def prompt(self) -> str:
        """What the model reads."""
        text = self.task.introduced(self.task.asked(self.vars))
        return text + self.task.led(text).rstrip(" ")

    @property
    def texts(self) -> list[str]:
        """The answers that there may be, as they are written after the prompt; none under a form without labels."""
        lead = self.task.led(self.task.asked(self.vars))
        return [lead + label for label in self.task.labels_of(self.vars)]

    def ask(self, model: str, number: int) -> CompletionAsk:
        """Return the request for the answer.

        Args:
            number: of the try, from 0.
        """
        form = self.task.answer
        longest = max(map(len, self.texts), default=0)
        most = form.max_tokens if isinstance(form, JsonForm | FreeText) else _BYTES_OF_LABEL * longest
        drawn = {"temperature": _TEMPERATURE if number else 0.0, "seed": number}
        return CompletionAsk.model_validate({"model": model, "prompt": self.prompt, "max_tokens": most, **drawn})

    def is_whole(self, text: str) -> bool:
        """Tell whether nothing that may follow changes the answer."""
        form, said = self.task.answer, text.lstrip()
        if isinstance(form, JsonForm):
            return object_in(said, form.schema_) is not None
        ends = form.stop if isinstance(form, FreeText) else ("\n",)
        return any(end in said for end in ends)

    def checked(self, text: str) -> Answer | None:
        """Return the answer that was written, if it has the task's form."""
        form = self.task.answer
        if isinstance(form, JsonForm):
            return object_in(text.strip(), form.schema_)
        if isinstance(form, FreeText):
            return up_to(text, form.stop) or None
        return label_in(text, self.task.labels_of(self.vars))

    def malformed(self) -> ApiError:
        """Return the refusal in place of an answer that has not the form."""
        message = f"the model wrote nothing of the form of task {self.task.name!r}, in {NUM_TRIES} tries"
        return ApiError(502, message, kind="server_error", code="malformed_answer")


class ServedTasks:
    """The tasks by name.

    Args:
        tasks: each with a name of its own.
    """

    def __init__(self, tasks: Sequence[Task] = ()) -> None:
        self._tasks = {task.name: task for task in tasks}
        self._grammars: dict[str, Grammar | None] = {}

    def question(self, name: str, ask: TaskAsk) -> Question:
        """Return the input that a request asks about.

        Raises:
            ApiError: 404 where no task has the name; 400 where the fields are not its.
        """
        task = self._tasks.get(name)
        if task is None:
            raise ApiError(404, "there is no task of this name here; GET /v1/tasks lists them", code="task_not_found")
        values: dict[str, Value] = {
            key: value if isinstance(value, str) else tuple(value) for key, value in ask.vars.items()
        }
        if problems := task.input_problems(values):
            raise ApiError(400, f"vars: {'; '.join(problems)}", param="vars")
        return Question(task, values)

    def cards(self) -> list[dict[str, Any]]:
        """Return what is told of each task."""
        return [
            {
                "id": task.name,
                "object": "task",
                "description": task.description,
                "fields": dict(task.fields),
                "answer": task.answer.model_dump(mode="json"),
                "digest": task.digest,
            }
            for task in self._tasks.values()
        ]

    def grammar(self, question: Question, grammars: Grammars) -> Grammar | None:
        """Return what an answer is held to while it is written; None for free text, and without the extra.

        Raises:
            ApiError: 400; the texts to choose from are too long together.
        """
        task, form = question.task, question.task.answer
        if isinstance(form, FreeText):
            return None
        if task.name in self._grammars:
            return self._grammars[task.name]
        try:
            found = grammars.of(form.schema_) if isinstance(form, JsonForm) else grammars.of_texts(question.texts)
        except ApiError as error:
            if error.code != "unsupported_parameter":
                raise
            say(
                f"answers of task {task.name!r} are checked, and not held to their form while they are written: {error}"
            )
            found = None
        if found is None or form.type != "choice":  # of a choice every input has its own
            self._grammars[task.name] = found
        return found
