"""What qemu-img does for a checkpoint: overlays are made and found with it."""

import contextlib
import json
import os

from ..errors import CannotDo


def create_overlay(image: str, kind: str, size: int, overlay: str) -> None:
    """A new qcow2 over an image of this format and size, for whoever the image is; FileExistsError, CannotDo."""
    # Two who make the same one are told apart here; qemu-img takes what is there.
    try:
        os.close(os.open(overlay, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        raise
    except OSError as error:
        raise CannotDo(f"cannot create {overlay}: {error.strerror}") from error
    try:
        run_qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", image, "-F", kind, overlay, str(size))
        found = os.stat(image)
        os.chmod(overlay, found.st_mode & 0o777)
        if (found.st_uid, found.st_gid) != (os.geteuid(), os.getegid()):
            os.chown(overlay, found.st_uid, found.st_gid)
    except BaseException as error:
        os.unlink(overlay)
        if not isinstance(error, OSError):
            raise
        raise CannotDo(f"cannot give {overlay} to the owner of {image}: {error.strerror}") from error


def overlays_of(image: str) -> list[str]:
    """The images beside this one that lie right above it."""
    found = []
    for name in sorted(os.listdir(os.path.dirname(image))):
        path = os.path.join(os.path.dirname(image), name)
        if name.endswith(".qcow2") and path != image:
            with contextlib.suppress(CannotDo, ValueError):
                told = json.loads(run_qemu_img("info", "-U", "--output=json", path))
                below = told.get("full-backing-filename")
                if below and os.path.realpath(below) == image:
                    found.append(path)
    return found


def run_qemu_img(*arguments: str) -> str:
    """What it says; CannotDo with its words."""
    import subprocess

    try:
        done = subprocess.run(
            ("qemu-img", *arguments), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotDo(f"cannot run qemu-img: {error}", "it is in the package qemu-utils") from error
    if done.returncode:
        raise CannotDo(f"qemu-img {arguments[0]}: {done.stderr.strip().removeprefix('qemu-img: ')}")
    return done.stdout
