"""Whether boxes tile a box: the pieces of a tensor that ranks saved. Pure index arithmetic."""

from collections.abc import Iterable, Sequence

Box = tuple[Sequence[int], Sequence[int]]
"""Where it starts, and its size."""


def tiles(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Whether the boxes fill a tensor of this shape, each place once.

    True of grids only, even or not, as sharding makes them: each cut goes all the way through.
    Takes little more time than sorting the boxes.
    """
    return _fill(([0] * len(shape), shape), boxes, 2 * len(shape))


def _fill(whole: Box, boxes: Sequence[Box], num_cuts: int) -> bool:
    start, size = whole
    if len(boxes) == 1:
        return list(boxes[0][0]) == list(start) and list(boxes[0][1]) == list(size)
    if not num_cuts:
        return False
    for dim in range(len(size)):
        slabs = list(_slabs(boxes, dim))
        if len(slabs) > 1:
            at = start[dim]
            for first, end, inside in slabs:
                if first != at or end == first:
                    return False
                slab = [_with(start, dim, first), _with(size, dim, end - first)]
                if not _fill((slab[0], slab[1]), inside, num_cuts - 1):
                    return False
                at = end
            return at == start[dim] + size[dim]
    return False


def _slabs(boxes: Iterable[Box], dim: int) -> Iterable[tuple[int, int, list[Box]]]:
    """The boxes, parted where no box is cut: first and last place of each slab, and its boxes."""
    first = end = 0
    inside: list[Box] = []
    for box in sorted(boxes, key=lambda box: box[0][dim]):
        start = box[0][dim]
        if inside and start >= end:
            yield first, end, inside
            inside = []
        if not inside:
            first = end = start
        inside.append(box)
        end = max(end, start + box[1][dim])
    yield first, end, inside


def _with(values: Sequence[int], dim: int, value: int) -> list[int]:
    return [*values[:dim], value, *values[dim + 1 :]]
