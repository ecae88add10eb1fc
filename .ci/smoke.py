"""Imports an installed or freshly built fastnuggets and runs an op of each family on the CPU."""

import torch

import fastnuggets
from fastnuggets import ops

print({key: value for key, value in fastnuggets.build_info().items() if value is not None})

coords = torch.tensor([[0.0, 0.0, 0.0], [1.5, 0.0, 0.0]], requires_grad=True)
grid = ops.voxelize(coords, torch.tensor([0, 1]), shape=9, num_channels=2, density="gaussian", sigma=0.7)
grid.sum().backward()
assert grid.shape == (1, 2, 9, 9, 9)
assert grid[0, 0, 4, 4, 4] == 1
