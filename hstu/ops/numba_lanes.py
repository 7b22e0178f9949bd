"""What compiled loops on a CPU are made of: how they are compiled and kept, vectors of float32, an exponential.

numba keeps what it compiled by the file of the function, and does not see a change of this one: delete the folders
``__pycache__`` (``make clean``) after one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, njit, types
from numba.core import cgutils

intrinsic: Any = extending.intrinsic  # its own types know nothing of the first argument
logger = logging.getLogger(__name__)

LANES = 16  # of a vector: one register of AVX-512, two of AVX2, four of others
MATHS = {"contract", "reassoc", "arcp", "nsz"}  # nothing that would hide a NaN or an infinity


def compiled(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile for one signature, now or from what an earlier process kept; without the GIL, in one thread."""

    def decorate(function: Callable[..., Any]) -> Any:
        options: dict[str, Any] = {"nogil": True, "fastmath": MATHS, "error_model": "numpy", "no_cfunc_wrapper": True}
        try:
            return njit(signature, cache=True, **options)(function)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            logger.warning("CPU loops are compiled in every process: no folder to keep them in can be written")
            return njit(signature, **options)(function)

    return decorate


class _Vector(types.Type):
    """``LANES`` numbers of float32 in registers."""

    def __init__(self) -> None:
        super().__init__(name=f"float32 x {LANES}")


_vector = _Vector()
_IR = ir.VectorType(ir.FloatType(), LANES)


@extending.register_model(_Vector)
class _VectorModel(extending.models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _IR)


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), _IR.as_pointer())


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """The vector at ``index`` of a contiguous float32 array of one dimension."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _address(context, builder, signature.args[0], *arguments)
        return builder.load(place, align=4)

    return _vector(array, types.intp), generate


@intrinsic
def store(typing: Any, array: Any, index: Any, vector: Any) -> Any:
    """Write a vector to ``index`` of a contiguous float32 array of one dimension."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _address(context, builder, signature.args[0], *arguments[:2])
        builder.store(arguments[2], place, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, _vector), generate


@intrinsic
def prefetch(typing: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of ``index`` of a contiguous array of one dimension, without waiting for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t] + [ir.IntType(32)] * 3)
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        place = builder.bitcast(builder.gep(data, [arguments[1]]), cgutils.voidptr_t)
        builder.call(function, [place, *(ir.Constant(ir.IntType(32), x) for x in (0, 3, 1))])  # to read, near, data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


def _in_each_lane(builder: Any, number: Any) -> Any:
    one = builder.insert_element(ir.Constant(_IR, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(_IR, ir.Undefined), lanes)


@intrinsic
def splat(typing: Any, array: Any, index: Any) -> Any:
    """The number at ``index`` of a contiguous float32 array of one dimension, in each lane."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return _in_each_lane(builder, builder.load(builder.gep(data, [arguments[1]])))

    return _vector(array, types.intp), generate


@intrinsic
def zeros(typing: Any) -> Any:
    """The vector of zeros."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(_IR, [0.0] * LANES)

    return _vector(), generate


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c`` of vectors, in one instruction where there is one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(_IR, [_IR] * 3)
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
        return builder.call(function, arguments)

    return _vector(_vector, _vector, _vector), generate


@intrinsic
def add(typing: Any, a: Any, b: Any) -> Any:
    """``a + b`` of vectors."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments)

    return _vector(_vector, _vector), generate


@intrinsic
def total(typing: Any, a: Any) -> Any:
    """The sum of the lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), _IR])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
        # In halves, not one lane after the other.
        return builder.call(function, [ir.Constant(ir.FloatType(), 0.0), *arguments], fastmath=("reassoc",))

    return types.float32(_vector), generate


@njit(fastmath=MATHS, inline="always")
def exp(x):  # type: ignore[no-untyped-def]
    """``e^x`` of a float32 to 2e-7 of itself, from -87 to 88: a polynomial, for loops that become vectors."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    whole = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    # The rest of x, ln 2 in two parts: their products are exact.
    f = x - whole * np.float32(0.693359375) - whole * np.float32(-2.12194440e-4)
    p = np.float32(1.0 / 720)
    p = p * f + np.float32(1.0 / 120)
    p = p * f + np.float32(1.0 / 24)
    p = p * f + np.float32(1.0 / 6)
    p = p * f + np.float32(0.5)
    p = (p * f + np.float32(1.0)) * f + np.float32(1.0)
    return p * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
