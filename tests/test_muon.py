"""Muon on a CPU: torch's own to the digits that bfloat16 has, and its state goes on in either."""

import pytest
import torch

from torch_ref.training.muon import Float32Muon, orthogonal

OPTIONS = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}


def after_steps(kind: type, shape: tuple[int, int], state: dict | None = None, steps: int = 3):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(shape))
    grads = torch.randn(steps, *shape)
    optimiser = kind([p], **OPTIONS)
    if state:
        optimiser.load_state_dict(state)
    for grad in grads:
        p.grad = grad.clone()
        optimiser.step()
    return p.detach(), optimiser.state_dict()


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8)])
def test_a_step_is_torchs_to_the_digits_of_bfloat16(shape):
    ours, state = after_steps(Float32Muon, shape)
    theirs, their_state = after_steps(torch.optim.Muon, shape)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3 * 0.02 * 0.2 * 20**0.5 * 2**-5)
    assert not torch.allclose(ours, after_steps(Float32Muon, shape, steps=2)[0], atol=1e-2)
    (mean,), (their_mean,) = (
        [part["momentum_buffer"] for part in one["state"].values()] for one in (state, their_state)
    )
    assert torch.equal(mean, their_mean)
    after_steps(torch.optim.Muon, shape, state)
    after_steps(Float32Muon, shape, their_state)


def test_matrices_of_one_shape_step_together_as_each_would_alone():
    torch.manual_seed(1)
    together = [torch.nn.Parameter(torch.randn(shape)) for shape in ((6, 9), (4, 4), (6, 9))]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    grads = [torch.randn(p.shape) for p in together]
    for parameters in (together, *([p] for p in alone)):
        optimiser = Float32Muon(parameters, **OPTIONS)
        for p in parameters:
            p.grad = grads[next(i for i, q in enumerate([*together, *alone]) if q is p) % 3].clone()
        optimiser.step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)


def test_singular_values_come_near_one_and_vectors_stay():
    torch.manual_seed(0)
    grad = torch.randn(12, 30)
    result = orthogonal(grad, (3.4445, -4.775, 2.0315), 5, 1e-7)
    u, _, v = torch.linalg.svd(grad, full_matrices=False)
    inner = u.T @ result @ v.T
    values = inner.diagonal()
    assert (values > 0.6).all() and (values < 1.3).all()
    assert (inner - values.diag()).abs().max() < 1e-4
