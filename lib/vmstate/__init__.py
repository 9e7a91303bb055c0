"""vmstate: the state of QEMU/KVM guests as a stream between small commands."""

__version__ = "0.1.0"
