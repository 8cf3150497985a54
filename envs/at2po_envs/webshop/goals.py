"""What customers ask for: the goals of a set of products, in the published order and splits.

A goal is an instruction with an upper price. A person's instruction is one goal; a synthetic one is a goal
for each combination of the product's options. The original lists the goals in the order of the products and
shuffles the list with seed 233; of 1.18 million products it keeps all of them in memory. `GoalTable.write`
stores three numbers for each instruction and the shuffled order instead, and a goal is made when it is asked
for.

The original draws the upper price anew at every start. Here it follows from the goal, so that a task stays
the same.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from at2po_env import Task
from at2po_env.errors import ConfigError, DataError
from at2po_envs.webshop.products import Product

Kind = Literal["human", "synthetic"]
KINDS: tuple[Kind, ...] = ("human", "synthetic")
SPLITS = ("train", "dev", "test", "all")
SHUFFLE_SEED = 233
TEST_GOALS, DEV_GOALS = 500, 1000

NO_LIMIT = 1_000_000.0
"""The upper price of products that cost nearly 1,000 dollars or more."""


class Goal(NamedTuple):
    """What the customer wants.

    Attributes:
        id: `ASIN-h0` (the first instruction by people), `ASIN-s12` (the synthetic one, options' combination
            12).
        product: The product that the goal was made from; another may satisfy it as well.
        text: The instruction that the policy reads.
        attributes: Properties that count.
        options: Options that count: values, or pairs (name of the option, value).
        price_upper: Dollars that it may cost.
    """

    id: str
    product: Product
    text: str
    attributes: tuple[str, ...]
    options: tuple[str | tuple[str, str], ...]
    price_upper: float


def price_of(product: Product) -> float:
    """Return what a product costs: where it has a range of prices, a number drawn from it by its id."""
    if len(product.prices) == 1:
        return product.prices[0]
    return random.Random(f"price {product.asin}").uniform(*product.prices)


def _price_limit(product: Product, draw: str) -> tuple[float, str]:
    """Draw the upper price: the larger of two of the next four multiples of ten below 1,000."""
    price = price_of(product)
    above = [10.0 * tens for tens in range(1, 100) if 10.0 * tens > price][:4]
    if len(above) < 2:
        return NO_LIMIT, ""
    limit = max(random.Random(f"limit {product.asin} {draw}").sample(above, 2))
    return limit, f", and price lower than {limit:.2f} dollars"


def human_goal(product: Product, number: int) -> Goal:
    """Make the goal of an instruction that a person wrote."""
    text, attributes, options = product.human[number]
    limit, clause = _price_limit(product, f"h{number}")
    return Goal(f"{product.asin}-h{number}", product, text.strip(".") + clause, attributes, options, limit)


def synthetic_goal(product: Product, number: int) -> Goal:
    """Make the goal of the synthetic instruction with the combination of options that has this number."""
    assert product.synthetic is not None, "goals are numbered over products with a synthetic instruction"
    limit, clause = _price_limit(product, "s")
    # The last name's values change fastest, as in nested loops over the sorted names.
    options, rest = [], number
    for name, values in sorted(product.options, reverse=True):
        rest, at = divmod(rest, len(values))
        options.append((name, values[at]))
    options.reverse()
    wanted = " with " + ", and ".join(f"{name}: {value}" for name, value in options) if options else ""
    text, attributes, _ = product.synthetic
    return Goal(
        f"{product.asin}-s{number}", product, f"{text}{wanted}{clause}", attributes, tuple(options), limit
    )


def count_goals(product: Product, kind: Kind) -> int:
    """Return how many goals of a kind a product has."""
    if kind == "human":
        return len(product.human)
    return math.prod(len(values) for _, values in product.options) if product.synthetic is not None else 0


class GoalTable(NamedTuple):
    """The goals of one kind in a folder: where each product's goals begin, and the shuffled order."""

    rows: Any  # row of each product that has goals
    starts: Any  # number of the first goal of each of them, and at the end the number of all goals
    order: Any  # goal numbers as shuffled

    def __len__(self) -> int:
        """Return the number of goals."""
        return len(self.order)

    @classmethod
    def open(cls, folder: Path, kind: Kind) -> GoalTable:
        """Map the files of `write`; they are not read whole."""
        return cls(*(np.load(folder / f"{kind}-{name}.npy", mmap_mode="r") for name in cls._fields))

    @staticmethod
    def write(folder: Path, kind: Kind, counts: list[tuple[int, int]]) -> int:
        """Number the goals, shuffle them and write both.

        Args:
            folder: Where to write.
            kind: Human or synthetic.
            counts: (row, number of goals) of each product that has any, in order.

        Returns:
            The number of goals.
        """
        starts = np.cumsum([0, *(count for _, count in counts)], dtype=np.int64)
        order = array("q", range(int(starts[-1])))
        random.Random(SHUFFLE_SEED).shuffle(order)
        rows = np.array([row for row, _ in counts], np.int64)
        for name, values in (("rows", rows), ("starts", starts), ("order", np.array(order, np.int64))):
            np.save(folder / f"{kind}-{name}.npy", values)
        return len(order)


def split_range(split: str, count: int) -> range:
    """Return the places of a split in the shuffled order.

    The published split is the first 500 for the test, the next 1,000 for development, the rest for training.
    Sets with fewer than 3,000 goals, such as the sample, are split in the same proportions 1 : 2 : 3.

    Raises:
        ConfigError: There is no such split.
    """
    test, dev = min(TEST_GOALS, count // 6), min(DEV_GOALS, count // 3)
    ranges = {
        "test": range(test),
        "dev": range(test, test + dev),
        "train": range(test + dev, count),
        "all": range(count),
    }
    if split not in ranges:
        raise ConfigError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    return ranges[split]


class Goals:
    """The goals of one kind and split as tasks; a `TaskSource`.

    Args:
        table: The goals of the kind.
        kind: Human or synthetic.
        split: One of `SPLITS`.
        product: Returns the product of a row.
        find_row: Returns the row of a product id, None where there is none.
        name: What to call the source in errors.
    """

    def __init__(
        self,
        table: GoalTable,
        kind: Kind,
        split: str,
        *,
        product: Callable[[int], Product],
        find_row: Callable[[str], int | None],
        name: str,
    ) -> None:
        self.kind, self.split, self.name = kind, split, name
        self._table, self._product, self._find_row = table, product, find_row
        self._make = human_goal if kind == "human" else synthetic_goal
        self._places = split_range(split, len(table))
        if not self._places:
            raise DataError(
                f"{name}: the split {split!r} has none of the {len(table)} {kind} goals. Fix: give goals= "
                f"the other kind ({' or '.join(KINDS)}), or another split."
            )
        self.goal = lru_cache(maxsize=4096)(self._goal)

    def __len__(self) -> int:
        """Return the number of goals."""
        return len(self._places)

    def __getitem__(self, index: int) -> Task:
        """Return the task at `index`."""
        number = int(self._table.order[self._places[index]])
        at = int(np.searchsorted(self._table.starts, number, side="right")) - 1
        product = self._product(int(self._table.rows[at]))
        return _task(self._make(product, number - int(self._table.starts[at])))

    def by_id(self, task_id: str) -> Task:
        """Return the task of a goal of this split.

        Raises:
            DataError: There is no such goal, or another split has it.
        """
        goal = self.goal(task_id)
        asin, _, number = task_id.rpartition("-")
        row = self._find_row(asin)
        assert row is not None, "a goal has a product"
        at = int(np.searchsorted(self._table.rows, row))
        place = np.flatnonzero(self._table.order == self._table.starts[at] + int(number[1:]))[0]
        if int(place) not in self._places:
            raise DataError(f"{self.name}: the goal {task_id!r} is not in the split {self.split!r}.")
        return _task(goal)

    def _goal(self, goal_id: str) -> Goal:
        """Return the goal with an id, of any split.

        Raises:
            DataError: There is no such goal.
        """
        asin, _, number = goal_id.rpartition("-")
        row = self._find_row(asin)
        digits = number[1:]
        if row is not None and number[:1] == self.kind[0] and digits.isascii() and digits.isdecimal():
            product = self._product(row)
            if str(int(digits)) == digits and int(digits) < count_goals(product, self.kind):
                return self._make(product, int(digits))
        raise DataError(
            f"{self.name}: there is no goal {goal_id!r}. Goals are called like {self[0].id!r}, and are of "
            f"the kind {self.kind!r}."
        )


def _task(goal: Goal) -> Task:
    wanted = {"asin": goal.product.asin, "attributes": list(goal.attributes), "price_upper": goal.price_upper}
    options = [list(option) if isinstance(option, tuple) else option for option in goal.options]
    return Task(goal.id, goal.text, (), {**wanted, "options": options})
