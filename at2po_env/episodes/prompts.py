r"""Prompt templates.

`{tools}` becomes the protocol's description of the tools, `{question}` the task's question. Templates are raw
strings, and the two names are replaced as plain text, so braces and backslashes (`\boxed{...}`) mean
themselves.
"""

from __future__ import annotations

from collections.abc import Callable

from at2po_env.data.tasks import Task
from at2po_env.errors import ConfigError

Prompt = str | Callable[[Task], str]

BOXED_PROMPT = r"""Answer the question step by step; use tools to find what you do not know.
Think first in every turn, between <think> and </think>. Then either call a tool or give the final answer.
{tools}
At most {calls} calls are possible. When you know the answer, write it as short as possible, in this form:
<think> why this is the answer </think>
<answer> The final answer is \boxed{answer here} </answer>

Question: {question}
"""

TAG_PROMPT = r"""Answer the question below.
Reason between <think> and </think> first, each time you get new information. Then call a tool or answer.
{tools}
At most {calls} calls are possible. If you need no more knowledge, give the answer between <answer> and
</answer>, without explanation. For example, <answer> Beijing </answer>.

Question: {question}
"""

SHORT_PROMPT = "Question: {question}\n"

PROMPTS = {"boxed": BOXED_PROMPT, "tag": TAG_PROMPT, "structured": TAG_PROMPT, "short": SHORT_PROMPT}


def make_prompt(prompt: Prompt, *, tools: str, calls: int) -> Callable[[Task], str]:
    """The function from a task to its prompt.

    Args:
        prompt: A name of `PROMPTS`, a template that holds `{question}`, or the function itself.
        tools: Text for `{tools}`.
        calls: Number for `{calls}`.

    Raises:
        ConfigError: A template without `{question}`.
    """
    if callable(prompt):
        return prompt
    template = PROMPTS.get(prompt, prompt).replace("{tools}", tools).replace("{calls}", str(calls))
    head, found, tail = template.partition("{question}")
    if not found:
        raise ConfigError(
            f"prompt {prompt[:60]!r} holds no {{question}}: expected a template with {{question}}, and "
            f"{{tools}} for the tools' description, or one of the names {', '.join(PROMPTS)}"
        )

    def build(task: Task) -> str:
        return f"{head}{task.question}{tail}"

    return build
