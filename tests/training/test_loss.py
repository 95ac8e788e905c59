"""The losses: what they weigh, and that the mean of the posterior stays the minimum of each."""

import pytest
import torch

from training.loss import EXACT, border_jumps, edm_losses, local_weight, loss_weight, objective

SIGMA = torch.tensor([0.1, 2.0])


def test_without_weights_the_objective_is_the_loss_of_edm():
    error = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(objective(error, SIGMA), edm_losses(error, SIGMA))


def test_jumps_are_those_across_borders_alone():
    error = torch.zeros(2, 3, 16, 16)
    error[0, :, 8:] = 0.5  # a step at the border of two 8-px blocks
    error[1, :, :, 7:] = 0.5  # one beside it, and beside those of 4-px patches
    expected = [0.25 / 2, 0.0]  # nothing across columns
    torch.testing.assert_close(border_jumps(error, 8), torch.tensor(expected))
    expected = [0.25 / 3 / 2, 0.0]  # one of three lines
    torch.testing.assert_close(border_jumps(error, 4), torch.tensor(expected))


def test_jumps_are_added_with_their_weight():
    error = torch.zeros(2, 3, 16, 16)
    error[:, :, 8:] = 0.5
    added = objective(error, SIGMA, None, (8, 4), 3.0) - objective(error, SIGMA)
    jumps = 0.25 / 2 + 0.25 / 3 / 2
    torch.testing.assert_close(added, 3 * jumps * loss_weight(SIGMA))


def test_places_weigh_by_what_the_lr_picture_tells():
    lr = torch.zeros(1, 3, 8, 8)
    lr[..., 4:] = 1.0
    weight = local_weight(lr)
    assert weight.shape == (1, 1, 32, 32)
    variance = torch.tensor(2 / 9)  # of 1, 1, 0 in each row
    expected = torch.where(
        torch.tensor([c in (3, 4) for c in range(8)]), 1 / (EXACT**2 + variance), 1 / EXACT**2
    )
    torch.testing.assert_close(weight[0, 0, 0], expected.repeat_interleave(4))


@pytest.mark.parametrize("border_weight", [0.0, 0.6])
def test_the_mean_of_the_posterior_is_the_minimum(border_weight):
    lr = torch.rand(1, 3, 4, 4)
    possible = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    denoised = possible.mean(dim=0, keepdim=True).requires_grad_()
    sigma = SIGMA[:1].expand(5)
    losses = objective(denoised - possible, sigma, local_weight(lr), (4, 8), border_weight)
    losses.mean().backward()
    assert denoised.grad is not None
    scale = 2 * local_weight(lr).max() / denoised.numel()
    assert denoised.grad.abs().max() < 1e-5 * scale
