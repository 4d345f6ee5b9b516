"""Operators by name: which ones a file may hold, which need permission, which none gets.

Nothing that a file names is looked up anywhere but in torch's own table of operators.
"""

from __future__ import annotations

import builtins
import operator
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any, NoReturn

import torch

from s2d_compiler.errors import FormatError
from s2d_compiler.fields import damaged, shown

#: Python functions of numbers, as captured graphs use them on sizes.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem,
    **{
        f"operator.{n}": getattr(operator, n)
        for n in ("add", "sub", "mul", "floordiv", "mod", "neg", "truediv")
    },
    "operator.pow": operator.pow,
    **{
        n: getattr(torch, n)
        for n in ("sym_max", "sym_min", "sym_int", "sym_float", "sym_not", "sym_ite")
    },
    "builtins.int": builtins.int,
}
_FUNCTION_NAMES = {v: k for k, v in _FUNCTIONS.items()}

#: Where operators that need no permission are defined.
_OWN_NAMESPACES = ("aten", "torchvision")
#: Operators that read files or memory of their own choosing, or change the process.
_FORBIDDEN = (
    *("from_file", "save", "set_", "record_stream", "resize", "data_ptr", "as_strided"),
    *("_cuda", "_cufft", "_pin_memory", "pin_memory", "_resize", "_copy_from", "_print", "_test"),
)
#: Parts of networks that torch defines under names of its own.
_PRIVATE = frozenset(
    "__and__ __lshift__ __or__ __rshift__ __xor__ _adaptive_avg_pool2d "
    "_adaptive_avg_pool3d _addmm_activation _aminmax _assert_async _assert_scalar "
    "_assert_tensor_metadata _cast_Byte _cast_Char _cast_Double _cast_Float _cast_Half "
    "_cast_Int _cast_Long _cast_Short _cdist_forward _conj _conj_physical _convolution "
    "_convolution_mode _euclidean_dist _is_all_true _is_any_true _log_softmax "
    "_logcumsumexp _neg_view _pad_circular _pdist_forward _prelu_kernel _safe_softmax "
    "_scaled_dot_product_attention_math _scaled_dot_product_efficient_attention "
    "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
    "_shape_as_tensor _softmax _to_copy _trilinear _unsafe_index _unsafe_view "
    "_upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d "
    "_upsample_nearest_exact2d _upsample_nearest_exact3d _weight_norm "
    "_weight_norm_interface".split()
)
#: Inside or beside networks, not in them: gradients, and layouts and libraries whose operators
#: take what they are given on trust.
_APART = re.compile(
    r"_|.*backward|.*sparse|(cudnn|miopen|mkldnn|mps|fbgemm|quantize|quantized|q|nested)_"
    r"|.*_(jvp|mps)(_|$)|lstm_mps|choose_qparams|int_repr|to_mkldnn|empty_quantized|hspmm|smm$"
    r"|sspaddmm|native_batch_norm$|batch_norm_\w+$|to_padded_tensor|set$|.*overrideable"
    r"|binomial$|linalg_eig(vals)?$|special_.*_polynomial|(lstm|gru|rnn_\w+)_cell$"
)


def operator_to_name(target: Any, place: str) -> str:
    """The name of an operator; any that writes into nothing has one.

    Raises:
        FormatError: It is not one that a file may hold.
    """
    if isinstance(target, torch._ops.OpOverload):
        name = f"{target.namespace}.{target._opname}.{target._overloadname}"
        operator_from_name(name, place, (_listed(target),))
        return name
    if target in _FUNCTION_NAMES:
        return _FUNCTION_NAMES[target]
    raise FormatError(
        f"{place}: {getattr(target, '__name__', target)!r} is a Python function, which a dyn.pt "
        "cannot hold (it holds data, no code); express the node with ATen operators, or make it "
        "an operator with torch.library."
    )


def needed_permission(target: Any) -> str | None:
    """What the reader of a file must allow for an operator: ``namespace::operator``, or None."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    return None if _is_own(target.namespace, target._opname) else _listed(target)


def _listed(target: torch._ops.OpOverload) -> str:
    return f"{target.namespace}::{target._opname}"


def _is_own(namespace: str, name: str) -> bool:
    return namespace in _OWN_NAMESPACES and (
        _APART.match(name) is None or (namespace == "aten" and name in _PRIVATE)
    )


def operator_from_name(name: str, place: str, allowed: Collection[str] | None = ()) -> Any:
    """The operator of a name.

    Args:
        name: ``namespace.operator.overload``, or one of a few Python functions.
        place: Where the name stands, for messages.
        allowed: Operators beside those of networks, as ``namespace::operator``. None where the
            graph is only looked at: what is not allowed then stands in for itself and refuses to
            run.

    Raises:
        FormatError: There is none, or it is not one that a file may hold.
    """
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    parts = name.split(".")
    if len(parts) != 3 or not all(p.isidentifier() and p.isascii() for p in parts):
        damaged(place, f"{shown(name)} is not the name of an operator")
    namespace, operator_name, _ = parts
    is_own, listed = _is_own(namespace, operator_name), f"{namespace}::{operator_name}"
    if operator_name.startswith(_FORBIDDEN):
        _refuse_impure(name, place)
    if not is_own and allowed is None:
        return _stand_in(name)
    if not is_own and listed not in (allowed or ()):
        _refuse(name, listed, place)
    target = _find(name)
    if target is None:
        where = f"in torch {torch.__version__}; install the version that the file was made with"
        if namespace not in _OWN_NAMESPACES:
            where = "in this process; import the module that defines it first"
        raise FormatError(f"{place}: operator {name[:60]!r} does not exist {where}.")
    if target._schema.is_mutable:
        _refuse_impure(name, place)
    return target


def _refuse_impure(name: str, place: str) -> NoReturn:
    raise FormatError(
        f"{place}: operator {name[:60]!r} is not one that a dyn.pt may hold (it is not pure); use "
        "one that computes from its arguments alone."
    )


def _refuse(name: str, listed: str, place: str) -> NoReturn:
    kind = "an operator of aten or torchvision"
    if listed.startswith(tuple(f"{namespace}::" for namespace in _OWN_NAMESPACES)):
        kind = "one that networks are made of (it is torch's own, for gradients or a library)"
    raise FormatError(
        f"{place}: {name[:60]!r} is not {kind}, and a file may not choose what else is run; if you "
        "trust that operator, import what defines it and allow it by name: "
        f'load(path, operators=["{listed[:60]}"]).'
    )


def _find(name: str) -> Any:
    """An operator of torch's dispatcher; what TorchScript alone has is none."""
    namespace, operator_name, overload = name.split(".")
    packet = getattr(getattr(torch.ops, namespace), operator_name, None)
    target = getattr(packet, overload, None) if packet is not None else None
    if not isinstance(target, torch._ops.OpOverload):
        return None
    full = f"{namespace}::{operator_name}" + ("" if overload == "default" else f".{overload}")
    known = torch._C._dispatch_has_kernel(full)
    return target if known else None


def check_arguments(target: Any, arguments: tuple[Any, ...], place: str) -> None:
    """Refuse literal arguments that torch takes on trust, at the price of the process.

    Raises:
        FormatError: naming the rule.
    """
    if not isinstance(target, torch._ops.OpOverload):
        return
    name = f"{target.namespace}::{target._opname}"
    if name.startswith(_LOOPS) and any(abs(n) > _TURNS for n in _numbers(arguments)):
        damaged(place, f"{target} has a number above {_TURNS}")
    if name not in _RECURRENT:
        return
    if target._overloadname != "input" or len(arguments) != 9:
        damaged(place, f"{target} is used in a way that no network uses it")
    states, weights, has_biases, layers = arguments[1:5]
    bidirectional = arguments[7]
    count = (layers if type(layers) is int else 0) * (2 if bidirectional else 1)
    each = {4, 5} if has_biases else {2, 3}  # a projection is one more
    if count < 1 or not isinstance(weights, list) or len(weights) not in {count * k for k in each}:
        damaged(place, f"{target} has not the weights of {shown(layers)} layers")
    if target._opname == "lstm" and not (isinstance(states, list) and len(states) == 2):
        damaged(place, f"{target} has not two states")


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int):
        yield value


#: Operators that divide by the size of their operand without looking at it.
WEIGHT_NORMS = (
    torch.ops.aten._weight_norm.default,
    torch.ops.aten._weight_norm_interface.default,
)
#: Operators that loop as often as they are told, whatever the size of their operands.
_LOOPS = ("aten::adaptive_", "aten::_adaptive_", "aten::matrix_power", "aten::linalg_matrix_power")
_TURNS = 2**16
_RECURRENT = frozenset(f"aten::{name}" for name in ("lstm", "gru", "rnn_tanh", "rnn_relu"))


def _stand_in(name: str) -> Callable[..., Any]:
    """What a graph that is only looked at holds in place of an operator that is not allowed."""

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise FormatError(
            f"{name!r} was not allowed when the file was read, so it cannot run; allow it with "
            "load(path, operators=[...])."
        )

    # Names in generated source: never those of a module that could be found.
    refused.__module__, refused.__name__ = "not_allowed", name.replace(".", "_")
    return refused


def is_arithmetic(target: Any) -> bool:
    """Whether something is one of the Python functions that compute with numbers."""
    return target is not operator.getitem and target in _FUNCTION_NAMES
