"""Evaluates arithmetic from its syntax tree: listed names only, and every operation at a bounded cost.

A long operation on integers holds the interpreter lock, so no deadline could end it. The cost is therefore
bounded before an operation is executed: numbers have at most `MAX_BITS` bits, powers and rounding digits
that could exceed them are refused, and so are expressions of more than `MAX_LENGTH` characters or `MAX_DEPTH`
levels.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from at2po_env.errors import ToolError
from at2po_env.tools.base import Tool, ToolContext

MAX_LENGTH = 500
MAX_DEPTH = 100
MAX_BITS = 4096
MAX_DIGITS = 1233  # decimal digits of a number of MAX_BITS bits

Number = int | float


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > MAX_BITS:
        raise ToolError("number too large")
    power: Number = base**exponent
    return power


def _round(number: Number, digits: int | None = None) -> Number:
    if isinstance(digits, int) and abs(digits) > MAX_DIGITS:  # round(1, -10**8) would compute 10**(10**8)
        raise ToolError(f"round to {digits:.3g} digits: at most {MAX_DIGITS} are possible")
    return round(number, digits)


_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
_UNARY: Mapping[type[ast.unaryop], Callable[[Any], Number]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_FUNCTIONS: Mapping[str, Callable[..., Number]] = {
    "abs": abs,
    "ceil": math.ceil,
    "cos": math.cos,
    "exp": math.exp,
    "floor": math.floor,
    "log": math.log,
    "log10": math.log10,
    "log2": math.log2,
    "max": max,
    "min": min,
    "round": _round,
    "sin": math.sin,
    "sqrt": math.sqrt,
    "tan": math.tan,
}
_CONSTANTS: Mapping[str, float] = {"pi": math.pi, "e": math.e}


class CalculatorArguments(BaseModel):
    """Arguments of a calculation."""

    model_config = ConfigDict(extra="forbid")

    expression: str = Field(description="arithmetic, e.g. (1987 - 1912) * 2 or sqrt(2) ** 3")


class CalculatorTool(Tool):
    """Evaluates + - * / // % ** and a few functions on numbers; anything else is a failed call."""

    failures: ClassVar[tuple[type[Exception], ...]] = (ToolError,)

    name = "calculator"
    description = f"Evaluate an arithmetic expression. Functions: {', '.join(_FUNCTIONS)}; constants: pi, e."
    Arguments = CalculatorArguments

    def run(self, arguments: CalculatorArguments, context: ToolContext) -> str:
        """Evaluate the expression, and write the number as Python does."""
        del context
        return str(evaluate(arguments.expression))


def evaluate(expression: str) -> Number:
    """Return the value of an arithmetic expression.

    Raises:
        ToolError: Not arithmetic, too long, too large, or undefined (division by zero, square root of -1).
    """
    expression = expression.strip()
    if len(expression) > MAX_LENGTH:
        raise ToolError(f"expression of {len(expression):,} characters, at most {MAX_LENGTH} are evaluated")
    try:
        return _value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ToolError(f"cannot evaluate {expression[:80]!r}: {error}") from error


def _value(node: ast.expr, depth: int = 1) -> Number:
    if depth > MAX_DEPTH:
        raise ToolError(f"expression nested more than {MAX_DEPTH} levels deep")
    value: Any
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            pass
        case ast.Name(id=name) if name in _CONSTANTS:
            value = _CONSTANTS[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            value = _BINARY[type(op)](_value(left, depth + 1), _value(right, depth + 1))
        case ast.UnaryOp(op=unary, operand=operand) if type(unary) in _UNARY:
            value = _UNARY[type(unary)](_value(operand, depth + 1))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            value = _FUNCTIONS[name](*[_value(arg, depth + 1) for arg in args])
        case _:
            raise ToolError(f"not arithmetic: {ast.unparse(node)[:80]!r}")
    if isinstance(value, complex):
        raise ToolError("the result is not a real number")
    if value.bit_length() > MAX_BITS if isinstance(value, int) else not math.isfinite(value):
        raise ToolError("number too large")
    number: Number = value
    return number
