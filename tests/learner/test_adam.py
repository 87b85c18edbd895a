"""Adam takes the steps of the book, and none from numbers that are not finite."""

import pytest
import torch

from learner.adam import Adam


def test_steps_equal_those_of_torch() -> None:
    rng = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(3, 2, generator=rng), "b": torch.randn(4, generator=rng)}
    theirs = [w.clone().requires_grad_() for w in weights.values()]
    ours, book = Adam(weights, 0.01), torch.optim.Adam(theirs, lr=0.01, betas=(0.9, 0.99))
    for _ in range(20):
        gradients = {name: 3.0 * torch.randn(w.shape, generator=rng) for name, w in weights.items()}
        norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
        assert ours.step(gradients) == pytest.approx(float(norm), rel=1e-5)
        for parameter, gradient in zip(theirs, gradients.values(), strict=True):
            parameter.grad = gradient / max(1.0, float(norm))
        book.step()
    for ours_now, theirs_now in zip(weights.values(), theirs, strict=True):
        torch.testing.assert_close(ours_now, theirs_now.detach(), atol=1e-5, rtol=1e-4)


def test_a_gradient_that_is_not_finite_makes_no_step() -> None:
    adam = Adam({"a": torch.ones(2), "b": torch.ones(3)}, 0.01)
    before = dict(adam.weights)
    adam.step({"a": torch.full((2,), torch.nan), "b": torch.ones(3)})
    assert all(torch.equal(before[name], w) for name, w in adam.weights.items())
    assert adam.num_steps == 0


def test_a_step_leaves_the_old_weights_as_they_are() -> None:
    adam = Adam({"a": torch.ones(2)}, 0.01)
    published = dict(adam.weights)
    adam.step({"a": torch.ones(2)})
    assert torch.equal(published["a"], torch.ones(2))
    assert not torch.equal(adam.weights["a"], torch.ones(2))
