"""Position ids of image tokens: (plane, row, column), the three axes of FLUX's rotary embedding.

Kept in float32 whatever the model's dtype: the released pipeline makes them in the prompt embeddings' dtype, and
bfloat16 holds whole numbers exactly only up to 256. Equal wherever the released ones are exact.
"""

from collections.abc import Iterable

import torch

Grid = tuple[int, int]
"""(rows, columns) in tokens."""


def grid_ids(grid: Grid, origin: Grid = (0, 0)) -> torch.Tensor:
    """Ids of a grid of tokens in row-major order, the first one at `origin`.

    Returns:
        [rows * columns, 3] float32, plane 0.
    """
    rows, columns = grid
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = origin[0] + torch.arange(rows, dtype=torch.float32)[:, None]
    ids[..., 2] = origin[1] + torch.arange(columns, dtype=torch.float32)[None, :]
    return ids.reshape(rows * columns, 3)


def diagonal_origins(target: Grid, references: Iterable[Grid]) -> list[Grid]:
    """Where each reference starts: past the target and all earlier references on both axes (UNO, DreamO)."""
    row, column = target
    origins: list[Grid] = []
    for rows, columns in references:
        origins.append((row, column))
        row, column = row + rows, column + columns
    return origins
