"""The images among the arguments of a QEMU."""

import pytest
from vmstate.checkpoint.qemu_args import put_in_place
from vmstate.errors import WrongUsage

NEW = "/d/new,one.qcow2"


def placed(*words: str) -> list[str]:
    return put_in_place(["qemu", *words], lambda path: path == "/d/a,b.img", NEW)[1:]


@pytest.mark.parametrize(
    ("given", "made"),
    [
        (["-hda", "/d/a,b.img"], ["-hda", NEW]),
        (["--hdb", "/d/a,b.img", "-m", "1"], ["--hdb", NEW, "-m", "1"]),
        (
            ["-drive", "if=none,id=x,format=raw,file=/d/a,,b.img"],
            ["-drive", "if=none,id=x,format=qcow2,file=/d/new,,one.qcow2"],
        ),
        (["-drive", "file=file:/d/a,,b.img,if=virtio"], ["-drive", "file=/d/new,,one.qcow2,if=virtio"]),
        (
            ["-drive", "driver=raw,file.filename=/d/a,,b.img"],
            ["-drive", "driver=qcow2,file.filename=/d/new,,one.qcow2"],
        ),
        (
            ["-blockdev", "file,filename=/d/a,,b.img,node-name=f", "-blockdev", "raw,file=f,node-name=n"],
            [
                "-blockdev",
                "driver=file,filename=/d/new,,one.qcow2,node-name=f",
                "-blockdev",
                "driver=qcow2,file=f,node-name=n",
            ],
        ),
        (
            ["-blockdev", "driver=raw,file=f,node-name=n", "-blockdev", "driver=file,filename=/d/a,,b.img,node-name=f"],
            [
                "-blockdev",
                "driver=qcow2,file=f,node-name=n",
                "-blockdev",
                "driver=file,filename=/d/new,,one.qcow2,node-name=f",
            ],
        ),
        (
            ["-blockdev", '{"driver": "raw", "file": {"driver": "file", "filename": "/d/a,b.img"}}'],
            ["-blockdev", '{"driver": "qcow2", "file": {"driver": "file", "filename": "/d/new,one.qcow2"}}'],
        ),
    ],
)
def test_another_image_in_the_place_of_one(given: list[str], made: list[str]) -> None:
    assert placed(*given) == made


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["-hda", "/d/other"], "not among the arguments"),
        (["-kernel", "/d/a,b.img"], "not among the arguments"),
        (["-blockdev", "{not json"], "not among the arguments"),
        (["-drive"], "not among the arguments"),
        (["-hda", "/d/a,b.img", "-hdb", "/d/a,b.img"], "2 times among the arguments"),
        (["-blockdev", "driver=file,filename=/d/a,,b.img,node-name=f"], "without a format above"),
        (["-blockdev", "driver=file,filename=/d/a,,b.img"], "without a format above"),
        (["-blockdev", '{"driver": "qcow2", "backing": null, "file": {"filename": "/d/a,b.img"}}'], "what lies below"),
        (["-blockdev", "driver=qcow2,file.filename=/d/a,,b.img,backing=b"], "what lies below"),
        (
            ["-blockdev", "driver=file,filename=/d/a,,b.img,node-name=f", "-blockdev", "driver=qcow2,file=f,backing=b"],
            "what lies below",
        ),
    ],
)
def test_what_is_refused(given: list[str], words: str) -> None:
    with pytest.raises(WrongUsage, match=words):
        placed(*given)
