"""Arithmetic, evaluated from the syntax tree: no names but the listed ones, no unbounded numbers."""

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
MAX_BITS = 4096

Number = int | float

_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
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
    "round": round,
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
        """Evaluate and write the number as Python does."""
        del context
        return str(evaluate(arguments.expression))


def evaluate(expression: str) -> Number:
    """The value of an arithmetic expression.

    Raises:
        ToolError: Not arithmetic, too long, too large, or undefined (division by zero, square root of -1).
    """
    expression = expression.strip()
    if len(expression) > MAX_LENGTH:
        raise ToolError(f"expression of {len(expression):,} characters, at most {MAX_LENGTH} are evaluated")
    try:
        return _bounded(_value(ast.parse(expression, mode="eval").body))
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ToolError(f"cannot evaluate {expression[:80]!r}: {error}") from error


def _value(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(value)
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _bounded(_power(_value(left), _value(right)))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _bounded(_BINARY[type(op)](_value(left), _value(right)))
        case ast.UnaryOp(op=unary, operand=operand) if type(unary) in _UNARY:
            return _UNARY[type(unary)](_value(operand))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _bounded(_FUNCTIONS[name](*[_value(arg) for arg in args]))
    raise ToolError(f"not arithmetic: {ast.unparse(node)[:80]!r}")


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > MAX_BITS:
        raise ToolError("number too large")
    power: Number = base**exponent
    return power


def _bounded(value: Number) -> Number:
    if isinstance(value, complex):
        raise ToolError("the result is not a real number")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ToolError("number too large")
    return value
