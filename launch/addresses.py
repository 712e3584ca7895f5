"""The address at which the other nodes of a run reach this one."""

import os
import socket
import struct
import sys

import torch.distributed as dist

_SIOCGIFADDR = 0x8915  # of Linux's ioctl
_LOOPBACK = "127.0.0.1"


def own_address(several_nodes: bool) -> str:
    """Numeric address of this host towards the others. A collective of all ranks when there are several nodes.

    That of the interface in GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, or else of the one that leads to the master: what a host's own
    name stands for is often its loopback. On the master itself the way to any other node tells.
    """
    if not several_nodes:
        return _LOOPBACK
    own = _of_interface() or _towards(os.environ.get("MASTER_ADDR", ""))
    found: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(found, own)
    others = [address for address in found if not _is_loopback(address)]
    return _towards(others[0]) if _is_loopback(own) and others else own


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _of_interface() -> str:
    """IPv4 address of the interface that the user named, or nothing."""
    name = (os.environ.get("GLOO_SOCKET_IFNAME") or os.environ.get("NCCL_SOCKET_IFNAME") or "").split(",")[0]
    if not name or name.startswith(("^", "=")) or sys.platform != "linux":
        return ""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            return socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))[20:24])
        except OSError:  # no such interface, or a beginning of names, as NCCL allows
            return ""


def _towards(target: str) -> str:
    """Own address on the way to a host; nothing is sent."""
    try:
        family, _, _, _, place = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)
            return str(probe.getsockname()[0])
    except OSError:
        return _LOOPBACK
