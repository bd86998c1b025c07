"""Orders in which a scan visits the positions of a map, as the addresses of these in its row-major memory."""

from collections.abc import Callable, Sequence

import torch

INTEGERS = 5
"""Integers of an order: start, token, line, length and turn.

Position t of line l is ``start + l · line + t · token``; a line has ``length`` positions, and with ``turn`` (0 or 1)
every second line is walked from its other end.
"""

ORDERS: dict[str, Callable[[int, int], tuple[int, int, int, int, int]]] = {
    'rows': lambda H, W: (0, 1, W, W, 0),
    'columns': lambda H, W: (0, W, 1, H, 0),
    'rows_backwards': lambda H, W: (H * W - 1, -1, -W, W, 0),
    'columns_backwards': lambda H, W: (H * W - 1, -W, -1, H, 0),
    'rows_snake': lambda H, W: (0, 1, W, W, 1),
    'columns_snake': lambda H, W: (0, W, 1, H, 1),
}
"""The orders by name: their integers on a map of H x W positions."""


def addresses(op: str, orders: object, count: int, H: int, W: int) -> list[int]:
    """Returns the integers of named orders, one order after the other.

    Raises:
        TypeError: The orders are no sequence of names.
        ValueError: A name is unknown, or there are not ``count`` of them.
    """
    if not isinstance(orders, Sequence) or isinstance(orders, str) or any(not isinstance(name, str) for name in orders):
        raise TypeError(f'{op}: orders must be a sequence of names, got {orders!r}')
    for name in orders:
        if name not in ORDERS:
            raise ValueError(f'{op}: orders must be among {", ".join(ORDERS)}, got {name!r}')
    if len(orders) != count:
        raise ValueError(f'{op}: orders must be as many as dt has, {count}, got {len(orders)}')
    return [integer for name in orders for integer in ORDERS[name](H, W)]


def check_orders(op: str, orders: Sequence[int], count: int, positions: int) -> None:
    """Raises unless ``orders`` are the integers of ``count`` orders that visit each of the positions once."""
    if len(orders) != INTEGERS * count:
        raise ValueError(f'{op}: orders must be {INTEGERS} integers for each of {count}, got {len(orders)}')
    for order in split(orders):
        if not _visits_each_once(*order, positions):
            raise ValueError(f'{op}: each order must visit each of the {positions} positions once, got {order}')


def split(orders: Sequence[int]) -> list[tuple[int, ...]]:
    """Returns the integers of each order."""
    return [tuple(orders[first : first + INTEGERS]) for first in range(0, len(orders), INTEGERS)]


def visited(order: Sequence[int], positions: int, device: torch.device) -> torch.Tensor:
    """Returns the address of each step of an order that `check_orders` has passed, (positions,), int64."""
    start, token, line, length, turn = order
    lines = torch.arange(positions // length, device=device)[:, None]
    steps = torch.arange(length, device=device).expand(len(lines), length)
    if turn:
        steps = torch.where(lines % 2 == 1, length - 1 - steps, steps)
    return (start + lines * line + steps * token).flatten()


def _visits_each_once(start: int, token: int, line: int, length: int, turn: int, positions: int) -> bool:
    """Two strides visit a range without gaps once each if one is 1 and the other as long as what that one covers."""
    if length < 1 or positions % length or turn not in (0, 1):
        return False
    covered = 1
    for step, count in sorted(((token, length), (line, positions // length)), key=lambda pair: abs(pair[0])):
        if count > 1:
            if abs(step) != covered:
                return False
            covered *= count
    return start + min(0, token * (length - 1)) + min(0, line * (positions // length - 1)) == 0
