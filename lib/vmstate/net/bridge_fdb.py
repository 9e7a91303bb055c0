"""The forwarding entry of a card in a Linux bridge, moved by rtnetlink(7) (`bridge fdb replace`).

In place of `bridge fdb replace`, whose start takes as long as everything else here before the first frame.
"""

import os
import socket
import struct

NLMSG_ERROR = 2
RTM_NEWNEIGH = 28
NLM_F_REQUEST, NLM_F_ACK, NLM_F_REPLACE, NLM_F_CREATE = 1, 4, 0x100, 0x400
NUD_REACHABLE = 2
NTF_MASTER = 4
NDA_LLADDR = 2
HEADER = struct.Struct("=IHHII")
NEIGHBOUR = struct.Struct("=BxHiHBB")
# An attribute of 10 bytes, at a multiple of 4.
ADDRESS = struct.Struct("=HH6s2x")
PATIENCE = 2.0


def entry(mac: bytes, port: int) -> bytes:
    """The request to have the bridge of `port` (an interface's number) find `mac` behind it, until that ages."""
    body = NEIGHBOUR.pack(socket.AF_BRIDGE, 0, port, NUD_REACHABLE, NTF_MASTER, 0)
    body += ADDRESS.pack(10, NDA_LLADDR, mac)
    flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE
    return HEADER.pack(HEADER.size + len(body), RTM_NEWNEIGH, flags, 1, 0) + body


def move_entry(mac: bytes, port: int) -> None:
    """Carry that out; OSError with the kernel's reason."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        kernel.settimeout(PATIENCE)
        kernel.sendto(entry(mac, port), (0, 0))
        answer = kernel.recv(4096)
    kind = HEADER.unpack_from(answer)[1]
    number = -struct.unpack_from("=i", answer, HEADER.size)[0] if kind == NLMSG_ERROR else 0
    if number:
        raise OSError(number, os.strerror(number))
