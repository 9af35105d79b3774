"""glu and its backward: reference and kernel (in the interpreter) against fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from nbqlora.kernels.glu import (
    glu,
    glu_backward,
    glu_backward_reference,
    glu_backward_triton,
    glu_reference,
    glu_triton,
)
from tests.kernels.truth import (
    ALL_DTYPES,
    DEVICE,
    KERNEL_DTYPES,
    Frame,
    assert_no_worse,
    assert_rounded_once,
    framed,
    narrow_accesses,
    normal,
)

ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda g: functional.gelu(g, approximate="tanh"),
}
RUNS = [(glu_reference, glu_backward_reference, dtype) for dtype in ALL_DTYPES] + [
    (glu_triton, glu_backward_triton, dtype) for dtype in KERNEL_DTYPES
]
runs = pytest.mark.parametrize(("forward", "backward", "dtype"), RUNS)
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
shapes = pytest.mark.parametrize("shape", [(5, 63), (3, 255), (2, 507), (2, 2048), (3, 2055)], ids=str)
NAMES = ("dh", "gate", "up")


def inputs(shape, dtype):
    """dh, gate, up; gate wide enough to reach both ends of the activation."""
    return {name: normal(*shape, dtype=dtype, scale=3, seed=seed) for seed, name in enumerate(NAMES)}


def gradients(dh, gate, up, activation):
    """dgate, dup and h of the eager formula, by autograd."""
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    h = ACTIVATIONS[activation](gate) * up
    return [*torch.autograd.grad(h, (gate, up), dh), h.detach()]


@runs
@activations
@shapes
def test_forward(forward, backward, dtype, activation, shape):
    given = inputs(shape, dtype)
    gate, up = given["gate"], given["up"]
    out = Frame(shape, dtype)
    h = forward(framed(gate), framed(up), activation=activation, out=out.view)
    assert h is out.view
    out.assert_untouched_outside()
    act = ACTIVATIONS[activation]
    truth = act(gate.double()) * up.double()
    assert_no_worse(h, act(gate) * up, truth)
    assert_rounded_once(h, truth)
    allocated = forward(gate, up, activation=activation)
    assert allocated.dtype == dtype
    torch.testing.assert_close(allocated, h)


@runs
@activations
@shapes
@pytest.mark.parametrize("with_h", [False, True])
def test_backward(forward, backward, dtype, activation, shape, with_h):
    given = inputs(shape, dtype)
    outs = [Frame(shape, dtype, left=left) for left in ((8, 3, 0) if with_h else (8, 3))]
    named = dict(zip(("dgate", "dup", "h"), [out.view for out in outs], strict=False))
    backward(*(framed(given[name]) for name in NAMES), activation=activation, **named)
    eager = gradients(**given, activation=activation)
    truth = gradients(**{name: x.double() for name, x in given.items()}, activation=activation)
    for out, by_eager, true in zip(outs, eager, truth, strict=False):
        out.assert_untouched_outside()
        assert_no_worse(out.view, by_eager, true)
        assert_rounded_once(out.view, true)


@runs
@activations
@pytest.mark.parametrize("places", [("gate", "up", "dh"), ("up", "gate", "dh"), ("dh", "up", "gate")], ids=str)
def test_backward_in_place(forward, backward, dtype, activation, places):
    given = inputs((3, 255), dtype)
    expected = {name: torch.empty_like(given["gate"]) for name in ("dgate", "dup", "h")}
    backward(*(given[name] for name in NAMES), activation=activation, **expected)
    frames = {name: Frame((3, 255), dtype) for name in NAMES}
    mine = {name: frames[name].holding(given[name]) for name in NAMES}
    named = {output: mine[place] for output, place in zip(expected, places, strict=True)}
    backward(*(mine[name] for name in NAMES), activation=activation, **named)
    for name, output in named.items():
        torch.testing.assert_close(output, expected[name])
    for frame in frames.values():
        frame.assert_untouched_outside()


@runs
@pytest.mark.parametrize("place", ["gate", "up"])
def test_forward_in_place(forward, backward, dtype, place):
    given = inputs((3, 255), dtype)
    expected = forward(given["gate"], given["up"], activation="silu")
    forward(given["gate"], given["up"], activation="silu", out=given[place])
    torch.testing.assert_close(given[place], expected)


@runs
@activations
def test_large_gates(forward, backward, dtype, activation):
    """Far out an activation is its gate or 0, and its slope 1 or 0; no exponential becomes a NaN."""
    gate = torch.tensor([[-1e4, -400.0, -90.0, 0.0, 90.0, 400.0, 1e4]]).to(DEVICE, dtype)
    ones = torch.ones_like(gate)
    named = {name: torch.full_like(gate, torch.nan) for name in ("dgate", "dup", "h")}
    backward(ones, gate, ones, activation=activation, **named)
    slope = torch.tensor([[0.0, 0, 0, 0.5, 1, 1, 1]]).to(DEVICE, dtype)
    torch.testing.assert_close(named["dgate"], slope, rtol=0, atol=1e-30)
    for name in ("dup", "h"):
        torch.testing.assert_close(named[name], gate.clamp(min=0), rtol=0, atol=1e-30)
    torch.testing.assert_close(forward(gate, ones, activation=activation), named["h"], rtol=0, atol=0)


def test_the_op_chooses_by_the_tensor():
    given = inputs((3, 63), torch.float16)
    on_card = given["gate"].is_cuda
    forward, backward = (glu_triton, glu_backward_triton) if on_card else (glu_reference, glu_backward_reference)
    h = glu(given["gate"], given["up"], activation="gelu_tanh")
    assert torch.equal(h, forward(given["gate"], given["up"], activation="gelu_tanh"))
    found = []
    for op in (glu_backward, backward):
        found.append({name: torch.empty_like(h) for name in ("dgate", "dup", "h")})
        op(**given, activation="gelu_tanh", **found[-1])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_message_of_strides():
    gate = normal(8, 4, dtype=torch.float32).t()
    with pytest.raises(ValueError, match=r"neighbouring elements, got shape \(4, 8\), strides \(1, 4\)"):
        glu_triton(gate, gate, activation="silu")


def test_accesses_are_16_bytes_wide():
    found = narrow_accesses("tests.kernels.cases_glu", "glu_")
    assert len(found) == 9 and not any(found.values()), found
