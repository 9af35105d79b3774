"""The compiled glu kernels on a model's shapes."""

from __future__ import annotations

import pytest
import torch

from nbqlora.kernels.glu import glu_backward_triton, glu_triton
from tests.kernels.test_glu import ACTIVATIONS, NAMES, gradients, inputs
from tests.kernels.truth import Frame, assert_no_worse, framed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
shapes = pytest.mark.parametrize("shape", [(515, 14336), (257, 11008), (300, 4864), (1023, 507)], ids=str)


@dtypes
@activations
@shapes
def test_forward(dtype, activation, shape):
    given = inputs(shape, dtype)
    gate, up = given["gate"], given["up"]
    out = Frame(shape, dtype, right=8)
    glu_triton(framed(gate), framed(up), activation=activation, out=out.view)
    out.assert_untouched_outside()
    act = ACTIVATIONS[activation]
    assert_no_worse(out.view, act(gate) * up, act(gate.double()) * up.double())


@dtypes
@activations
@shapes
@pytest.mark.parametrize("place", ["apart", "in place"])
def test_backward(dtype, activation, shape, place):
    given = inputs(shape, dtype)
    frames = [Frame(shape, dtype, right=8) for _ in NAMES]
    if place == "in place":
        mine = dict(zip(("gate", "up", "dh"), frames, strict=True))
        sources = [mine[name].holding(given[name]) for name in NAMES]
    else:
        sources = [given[name] for name in NAMES]
    named = dict(zip(("dgate", "dup", "h"), [frame.view for frame in frames], strict=True))
    glu_backward_triton(*sources, activation=activation, **named)
    eager = gradients(**given, activation=activation)
    truth = gradients(**{name: x.double() for name, x in given.items()}, activation=activation)
    for frame, by_eager, true in zip(frames, eager, truth, strict=True):
        frame.assert_untouched_outside()
        assert_no_worse(frame.view, by_eager, true)
