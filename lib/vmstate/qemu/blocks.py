"""The disks of a guest, as `query-block` and its relatives tell of them (qapi/block-core.json), as typed values."""

from typing import NamedTuple

from ..fields import Fields
from .answers import objects
from .monitor import Monitor

# A name of layers in JSON can be long; QEMU cuts it at 4 KiB.
NAME = 64 << 10
# More layers than any chain of images has
DEEP = 256


class Image(NamedTuple):
    """name: as QEMU has it, of a file or of layers in JSON.  size: in bytes, as the guest sees it.  snapshots: those
    within it, by name.  below: the names of the images below it, the nearest first."""

    name: str
    size: int
    snapshots: tuple[str, ...]
    below: tuple[str, ...]


class Medium(NamedTuple):
    """node: the name of its node, '' where it has none.  driver: of its format."""

    node: str
    driver: str
    ro: bool
    image: Image


class BlockDevice(NamedTuple):
    """device, qdev: QEMU's names of it, '' where it has none.  medium: None where there is none in it."""

    device: str
    qdev: str
    removable: bool
    medium: Medium | None

    @property
    def writable(self) -> Medium | None:
        """Its medium, if the guest can write into it."""
        return self.medium if self.medium and not self.medium.ro else None


def block_devices(monitor: Monitor) -> list[BlockDevice]:
    return [_device(entry) for entry in objects(monitor, "query-block")]


def _device(entry: Fields) -> BlockDevice:
    inserted = entry.inner("inserted", None)
    return BlockDevice(
        entry.text("device"),
        entry.text("qdev", ""),
        entry.flag("removable", False),
        _medium(inserted) if inserted else None,
    )


def _medium(inserted: Fields) -> Medium:
    return Medium(
        inserted.text("node-name", ""), inserted.text("drv"), inserted.flag("ro"), _image(inserted.inner("image"))
    )


def _image(image: Fields) -> Image:
    snapshots = tuple(entry.text("name") for entry in image.objects("snapshots"))
    below: list[str] = []
    layer = image
    while (found := layer.inner("backing-image", None)) is not None:
        layer = found
        below.append(layer.text("filename", most=NAME))
        if len(below) > DEEP:
            raise image.error("backing-image", f"at most {DEEP} layers")
    return Image(image.text("filename", most=NAME), image.whole("virtual-size"), snapshots, tuple(below))


def block_jobs(monitor: Monitor) -> dict[str, str]:
    """The jobs on disks that are running, by name, and the status of each."""
    return {entry.text("device"): entry.text("status") for entry in objects(monitor, "query-block-jobs")}


def opened_files(monitor: Monitor) -> list[str]:
    """The name of every image that QEMU has open."""
    return [entry.text("file", most=NAME) for entry in objects(monitor, "query-named-block-nodes")]
