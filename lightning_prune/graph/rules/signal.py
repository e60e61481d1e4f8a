"""Complex numbers and Fourier transforms."""

from __future__ import annotations

from lightning_prune.graph.calls import Call, Planes, Rule
from lightning_prune.graph.labels import Plane, settle
from lightning_prune.graph.rules.pointwise import pointwise


def as_complex(call: Call) -> list[Planes]:
    """Pairs along the last dimension become one number each."""
    source = call.tensors[0]
    pairs = settle(call.space, call.planes(source), (source.dim() - 1,), "is half of a complex number")
    return [tuple(Plane(plane.ids.squeeze(-1), plane.zero) for plane in pairs)]


def as_real(call: Call) -> list[Planes]:
    """Each number becomes a pair along a new last dimension."""
    return [tuple(Plane(plane.ids.unsqueeze(-1), plane.zero) for plane in call.planes(call.tensors[0]))]


def same_number(call: Call) -> list[Planes]:
    """The conjugate or the negative, written down later."""
    return [call.planes(call.tensors[0])]


def fourier(call: Call) -> list[Planes]:
    """Fourier transforms mix along the transformed dimensions; they are linear, so zeros stay zeros elsewhere."""
    source = call.tensors[0]
    dims = [dim % source.dim() for dim in call.arguments["dim"]]
    return [settle(call.space, call.planes(source), dims, "is mixed along by a Fourier transform")]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("_fft_r2c", "_fft_c2r", "_fft_c2c"), fourier),
    **dict.fromkeys(("_conj", "_neg_view", "resolve_conj", "resolve_neg"), same_number),
    **dict.fromkeys(("complex", "polar"), pointwise),
    "view_as_complex": as_complex,
    "view_as_real": as_real,
}
