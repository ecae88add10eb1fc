import pytest
import torch

from fastnuggets.models.conditional_gaussian import ConditionalGaussian


def random_covariance(columns, generator):
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return mixing @ mixing.T / columns + 0.1 * torch.eye(columns, dtype=torch.float64)


def test_moments_are_those_of_the_schur_complement():
    generator = torch.Generator().manual_seed(0)
    model = ConditionalGaussian(6).double()
    model.center.copy_(torch.randn(6, generator=generator))
    model.covariance.copy_(random_covariance(6, generator))
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    hidden = torch.rand(20, 6, generator=generator) < 0.5
    hidden[0], hidden[1] = True, False
    mean, std = model(x, hidden)
    for row in range(20):
        gone, there = hidden[row].nonzero().flatten(), (~hidden[row]).nonzero().flatten()
        cross, among = model.covariance[gone][:, there], model.covariance[there][:, there]
        expected = model.center[gone] + cross @ torch.linalg.inv(among) @ (x[row, there] - model.center[there])
        spread = (model.covariance[gone][:, gone] - cross @ torch.linalg.inv(among) @ cross.T).diagonal().sqrt()
        torch.testing.assert_close(mean[row, gone], expected)
        torch.testing.assert_close(std[row, gone], spread)
        assert torch.equal(mean[row, there], x[row, there]) and (std[row, there] == 0).all()


def test_what_is_hidden_does_not_matter():
    generator = torch.Generator().manual_seed(1)
    model = ConditionalGaussian(4)
    model.covariance.copy_(random_covariance(4, generator))
    x, hidden = torch.randn(8, 4, generator=generator), torch.rand(8, 4, generator=generator) < 0.5
    other = torch.where(hidden, 7.0, x)
    assert all(map(torch.equal, model(x, hidden), model(other, hidden)))


def test_a_third_of_the_cells_missing_the_distribution_is_found():
    generator = torch.Generator().manual_seed(2)
    covariance = random_covariance(4, generator)
    scale = covariance.diagonal().rsqrt()
    covariance = scale[:, None] * covariance * scale
    center = torch.tensor([0.5, -0.5, 0.0, 1.0], dtype=torch.float64)
    factor = torch.linalg.cholesky(covariance)
    x = center + torch.randn(4000, 4, generator=generator, dtype=torch.float64) @ factor.T
    gaps = torch.rand(4000, 4, generator=generator) < 1 / 3
    model = ConditionalGaussian(4).double()
    model.estimate(x.masked_fill(gaps, torch.nan))
    # 4,000 rows with gaps tell an entry to about 2 %.
    assert (model.center - center).abs().max() < 0.06
    assert (model.covariance - covariance).abs().max() < 0.08
    # Of complete rows it is the covariance, but for the pseudo-row.
    model.estimate(x)
    expected = (3999 * x.T.cov() + torch.eye(4)) / 4001
    torch.testing.assert_close(model.covariance, expected, rtol=1e-9, atol=1e-9)


def test_columns_that_are_copies_and_columns_without_values_are_no_error():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(50, 1, generator=generator).repeat(1, 4)
    x[:, 3] = torch.nan
    model = ConditionalGaussian(4)
    model.estimate(x)
    hidden = torch.tensor([[True, False, False, True]])
    mean, std = model(torch.full((1, 4), 2.0), hidden)
    assert mean[0, 0].item() == pytest.approx(2.0, abs=0.1) and std[0, 0] < 0.3
    assert mean[0, 3].abs() < 0.2 and std[0, 3] == pytest.approx(1.0, abs=0.1)
