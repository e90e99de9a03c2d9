"""Parameters by name as vectors [p], in the order of their names, and back again."""

from __future__ import annotations

import torch
from torch import Tensor

from attribution_core.calling import Params


def flatten(directions: Params) -> Tensor:
    """[k, p] from a dict name -> [k, *shape]."""
    return torch.cat([value.reshape(len(value), -1) for value in directions.values()], dim=1)


def unflatten(flat: Tensor, params: Params) -> Params:
    """A dict name -> [k, *shape] from [k, p]."""
    parts = flat.split([value.numel() for value in params.values()], dim=1)
    return {
        name: part.reshape(len(flat), *value.shape)
        for part, (name, value) in zip(parts, params.items(), strict=True)
    }


def vector(params: Params) -> Tensor:
    """[p], float64 on the CPU."""
    return flatten({name: value[None] for name, value in params.items()})[0].double().cpu()


def by_name(vector: Tensor, like: Params) -> Params:
    """[p] as parameters by name, in the dtype and on the device of `like`."""
    parts = unflatten(vector[None], like)
    return {name: part[0].to(like[name]) for name, part in parts.items()}


def size_of(params: Params) -> int:
    """p: how many numbers they are."""
    return sum(value.numel() for value in params.values())


def normal_like(params: Params) -> Params:
    """Normal numbers in the shapes of parameters, the same at every call; drawn where the parameters are."""
    drawn: dict[torch.device, torch.Generator] = {}
    found = {}
    for name, value in params.items():
        where = value.device
        generator = drawn.setdefault(where, torch.Generator(where).manual_seed(0))
        found[name] = torch.randn(value.shape, generator=generator, device=where).to(value)
    return found
