"""Groups, routing and experts by loops over tokens in fp64: strangers to the package."""

import torch

from tests.oracles.nvfp4_brute import GRID, e4m3_value

E4M3 = torch.tensor([e4m3_value(byte) for byte in range(256)], dtype=torch.float64)
E2M1 = torch.tensor(GRID + [-g for g in GRID], dtype=torch.float64)


def decode(codes, scales, global_scales):
    """fp64 [groups, rows, cols] of stacked NVFP4 parts."""
    values = E2M1[torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()]
    factors = E4M3[scales.view(torch.uint8).long()].repeat_interleave(16, -1)
    return values * factors * global_scales.double()[:, None, None]


def groups_of(sizes):
    """(group, slice of its rows), empty ones too."""
    start = 0
    for group, size in enumerate(sizes):
        yield group, slice(start, start + size)
        start += size


def grouped(a, b, sizes):
    """a [rows, K], b [groups, N, K], fp64: y [rows, N]."""
    return torch.cat([a[rows] @ b[group].t() for group, rows in groups_of(sizes)])


def grouped_sums(a, b, sizes):
    """a [M, rows], b [N, rows], fp64: y [groups, M, N]."""
    return torch.stack([a[:, rows] @ b[:, rows].t() for _, rows in groups_of(sizes)])


def moe(x, indices, weights, up, down):
    """y[token] = sum over choices of weight * down[e] relu(up[e] x[token])^2, token by token, fp64."""
    y = torch.zeros_like(x)
    for token in range(len(x)):
        for choice, e in enumerate(indices[token].tolist()):
            y[token] += weights[token, choice] * (down[e] @ (up[e] @ x[token]).relu().square())
    return y
