"""Searches a retriever and shows the top passages, each cut to a length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from at2po_env.data.tasks import Task
from at2po_env.errors import ConfigError, RetrievalError, ToolError
from at2po_env.retrieval.base import Retriever
from at2po_env.tools.base import Tool, ToolContext, encodable

NO_RESULTS = "No passages found."


class SearchArguments(BaseModel):
    """Arguments of a search."""

    model_config = ConfigDict(extra="forbid")

    query: str = Field(description="what to look up")


class SearchTool(Tool):
    """Shows the best passages for a query as `Doc i(Title: t) text`, one per line.

    The error model: failures of a retriever are failed calls. They are `RetrievalError`, operating-system
    errors (a dead connection), time-outs, and the errors that data causes: `ValueError` (text that cannot be
    read) and `ArithmeticError` (a score that is too large). Any other exception, such as `KeyError` or
    `TypeError`, is a bug of the retriever and raises.

    Args:
        retriever: Where to search.
        topk: Number of passages.
        max_chars: Characters of each passage's text that are shown.
        max_query_chars: Longest query that is searched for.
        timeout_s: Seconds an attempt may take. None (default) for retrievers within the process, which then
            cost no thread.
        retries: Further attempts.
    """

    failures: ClassVar[tuple[type[Exception], ...]] = (
        ToolError,
        RetrievalError,
        OSError,
        ValueError,
        ArithmeticError,
    )

    name = "search"
    description = "Search the encyclopedia and get the best matching passages."
    Arguments = SearchArguments

    def __init__(
        self,
        retriever: Retriever,
        *,
        topk: int = 3,
        max_chars: int = 1000,
        max_query_chars: int = 2000,
        timeout_s: float | None = None,
        retries: int = 0,
    ) -> None:
        if topk < 1 or max_chars < 1 or max_query_chars < 1:
            raise ConfigError(
                f"search needs topk, max_chars and max_query_chars of at least 1, "
                f"got {topk}, {max_chars} and {max_query_chars}"
            )
        self.retriever = retriever
        self.topk = topk
        self.passage_chars = max_chars
        self.max_query_chars = max_query_chars
        self.timeout_s = timeout_s
        self.retries = retries
        self.max_chars = topk * (max_chars + 1000)  # the passages are cut one by one; this only bounds titles

    def validate(self, arguments: Mapping[str, Any]) -> Any:
        """Return the query; a lone string is right without the model."""
        query = arguments.get("query")
        if type(query) is str and len(arguments) == 1:
            return query
        return SearchArguments.model_validate(arguments).query

    def retriever_for(self, task: Task) -> Retriever:
        """Return the retriever of this task's corpus; a subclass may have one per task."""
        del task
        return self.retriever

    def run(self, arguments: str, context: ToolContext) -> str:
        """Search for the query and format what was found."""
        query = arguments.strip()
        if not query:
            raise ToolError("empty query")
        if len(query) > self.max_query_chars:
            raise ToolError(
                f"query of {len(query):,} characters, at most {self.max_query_chars:,} are searched for"
            )
        passages = self.retriever_for(context.task).search([encodable(query)], self.topk)[0]
        cut = self.passage_chars
        lines = [f"Doc {i}(Title: {p.title}) {p.text[:cut]}" for i, p in enumerate(passages, 1)]
        return "\n".join(lines) if lines else NO_RESULTS
