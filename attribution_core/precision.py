"""Numbers that keep their digits: float64 models in float64 throughout, sums of many in float32 at least."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def widened(x: Tensor) -> Tensor:
    """In float32 at least, where sums of many keep their digits."""
    return x.float() if x.dtype.itemsize < 4 else x


def roomy(dtype: torch.dtype) -> torch.dtype:
    """float32 for float16, which ends at 6e-8 and at 65,504; any other as it is."""
    return torch.float32 if dtype == torch.float16 else dtype


def rounding(value: Tensor) -> float:
    """Relative rounding of products: eps of the dtype, on a GPU of TF32's ten bits for float32, which may be in use."""
    eps = torch.finfo(value.dtype).eps
    return max(eps, 2.0**-10) if value.is_cuda and value.dtype == torch.float32 else eps


class _KeepDouble(TorchFunctionMode):
    """Leave float64 tensors float64 where a layer would cast them to float32.

    transformers' norms, rotary embeddings and softmaxes compute in float32 whatever the model's
    dtype; a model that was asked to be float64 would be exact to 1e-8 only. Products of a float64 and a
    float32 tensor (rotary positions, for example) are computed in float64; torch would raise an error.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if func is Tensor.to:
                args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") == torch.float32:
                kwargs["dtype"] = torch.float64
        if func in PRODUCTS and {getattr(a, "dtype", None) for a in args} == MIXED:
            args = tuple(a.double() for a in args)
        return func(*args, **kwargs)


PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
MIXED = {torch.float32, torch.float64}


def precision_of(params: Mapping[str, Tensor]) -> AbstractContextManager[Any]:
    """A context that computes in the parameters' own precision, see `_KeepDouble`."""
    double = {value.dtype for value in params.values()} == {torch.float64}
    return _KeepDouble() if double else nullcontext()
