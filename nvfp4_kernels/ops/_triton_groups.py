"""Where the tiles of groups of rows lie: the offsets are on the device and stay there.

As many programs start as the rows could need in the worst case, a tile more for each group than for rows without groups; each
finds its group, or that there is nothing left for it, from the offsets.
"""

from nvfp4_kernels.ops._triton import jit, tl


@jit
def picked(index_ptr, place, end, count):
    """Which row each place reads of `count` ones: `count`, which is none, from place `end` on and where the index is out of
    range."""
    row = tl.load(index_ptr + place, place < end, count)
    return tl.where(row < 0, count, row)


@jit
def find(offsets_ptr, groups, rows, place, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """(group, where its rows begin and end, first row of the tile) of the place-th tile of rows; beyond the last, `groups`.

    Offsets that do not ascend to `rows` give tiles that nobody asked for, and none outside the rows. GROUPS: a power of two
    from `groups` up.
    """
    group = tl.arange(0, GROUPS)
    start = tl.minimum(tl.maximum(tl.load(offsets_ptr + group, group < groups, 0), 0), rows)
    end = tl.minimum(tl.maximum(tl.load(offsets_ptr + group + 1, group < groups, 0), start), rows)
    tiles = tl.cdiv(end - start, ROWS)
    last = tl.cumsum(tiles, 0)
    mine = tl.sum(((last <= place) & (group < groups)).to(tl.int32), 0)
    picked = group == mine
    row = tl.sum(tl.where(picked, start + (place - (last - tiles)) * ROWS, 0), 0)
    return mine, tl.sum(tl.where(picked, start, 0), 0), tl.sum(tl.where(picked, end, 0), 0), row
