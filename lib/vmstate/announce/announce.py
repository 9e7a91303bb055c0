"""The announcement of cards in one go: round after round, in QEMU's rhythm."""

import socket
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..errors import CannotDo
from ..net.egress import Target, send, steer, target
from ..net.frames import of_card

__all__ = ["Failure", "Target", "announce", "packet_socket", "schedule", "steer", "target"]


def schedule(initial: int = 50, maximum: int = 550, rounds: int = 5, step: int = 100) -> list[int]:
    """The moments of the rounds in ms; QEMU's announce-initial, -max, -rounds and -step: 0, 50, 200, 450, 800."""
    moments = [0]
    for number in range(rounds - 1):
        moments.append(moments[-1] + wait_behind(number, initial, maximum, step))
    return moments


def wait_behind(number: int, initial: int, maximum: int, step: int) -> int:
    """The wait in ms behind a round, counted from 0."""
    return min(initial + number * step, maximum)


def packet_socket() -> socket.socket:
    """For sending alone; CannotDo without CAP_NET_RAW."""
    try:
        return socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    except PermissionError as error:
        raise CannotDo(
            "sending frames needs the capability CAP_NET_RAW",
            "run it as root, or keep the one capability:"
            " setpriv --reuid USER --clear-groups --inh-caps +net_raw --ambient-caps +net_raw vm-announce",
        ) from error


class Failure(NamedTuple):
    """A card that a round (counted from 1) could not announce."""

    round: int
    target: Target
    reason: str


def announce(sender: socket.socket, targets: Sequence[Target], moments: Sequence[int]) -> Iterator[Failure]:
    """Send every card's frames at each of the moments (ms from now); one card's failure keeps no other back."""
    prepared = [(place, of_card(place.nic.mac, place.nic.addresses)) for place in targets]
    start = time.monotonic()
    for number, moment in enumerate(moments, 1):
        time.sleep(max(0.0, start + moment / 1000 - time.monotonic()))
        for place, parts in prepared:
            try:
                for frame in parts:
                    send(sender, place, frame.data)
            except OSError as error:
                yield Failure(number, place, error.strerror or str(error))
