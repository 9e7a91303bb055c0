"""Messages that were changed, cut or spliced, on their way to a guest that waits: it never runs.

tests/unit/encrypt/test_cipher.py has hundreds of them, without a guest.
"""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Guests, shell
from vm import Guest, save
from vmstate.io.descriptors import HOLD
from vmstate.stream.description import description_at_end

from guest.judge import used_up
from guest.test_restore import SMALL

KEY = "me@example.org"
SEED = 20261125
MIB = 1 << 20

# What is between a message and the guest, and whether the message holds a packed state.
CHAINS = {
    "plain": ("vm-encrypt -d m | vm-restore b.qmp", False),
    "packed": ("vm-encrypt -d m | vm-compress -d | vm-restore b.qmp", True),
    "foreign": ("vm-restore --from 'gpg -q -d m' b.qmp", False),
}


@pytest.fixture(scope="module")
def messages(states: Path, gnupg: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, bytes]]:
    """Each twice, with different session keys: of a plain state, and of a packed one."""
    folder = tmp_path_factory.mktemp("forged")
    made = Guests(folder, states)
    try:
        made.running(**SMALL)
        script = f"""
            vm-dump -q -o s a.qmp && vm-compress -o s.vmz s &&
            for file in s s.vmz; do for n in 1 2; do vm-encrypt -r {KEY} -o $file.$n $file; done; done
        """
        assert shell(script, folder).status == 0
    finally:
        made.end()
    yield {name: (folder / name).read_bytes() for name in ("s.1", "s.2", "s.vmz.1", "s.vmz.2")}


def damaged(one: bytes, other: bytes, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """Three of each kind, one of which is near the end."""
    for near in (1, 1, 100):
        at = len(one) - 1 - chance.randrange(len(one) // near)
        yield f"flipped at {at}", one[:at] + bytes([one[at] ^ 1 << chance.randrange(8)]) + one[at + 1 :]
        yield f"cut at {at}", one[:at]
        yield f"spliced at {at}", one[:at] + other[at:]


def never_ran(guest: Guest) -> None:
    assert guest.status() in ("inmigrate", "gone")
    assert guest.count() is None


@pytest.mark.parametrize("chain", CHAINS)
def test_only_a_whole_one_runs(chain: str, guests: Guests, work: Path, messages: dict[str, bytes]) -> None:
    line, packed = CHAINS[chain]
    one, other = (messages[f"s.vmz.{n}" if packed else f"s.{n}"] for n in (1, 2))
    target = guests.waiting(**SMALL)
    for what, message in damaged(one, other, random.Random(SEED)):
        (work / "m").write_bytes(message)
        done = shell(f'{line}; echo "${{PIPESTATUS[@]}}"', work)
        *before, last = done.text.split()
        # The status of a stage of --from is not ours; and a stage may have nobody to write to any more.
        assert last == "3" or (chain, last) == ("foreign", "1"), f"{what}: {done.text}{done.err}"
        assert {*before} <= {"3", "141"}, f"{what}: {done.text}{done.err}"
        never_ran(target)
        if used_up(target):
            target.end()
            target = guests.waiting(**SMALL)
    (work / "m").write_bytes(one)
    assert shell(line, work).status == 0
    assert target.running()


# A guest with many vCPUs: more than a megabyte stands behind the mark that lets it run


class Many(Guest):
    """200 vCPUs and no system, with 40 MiB of chance in its memory; it is not started."""

    def _kernel(self) -> list[str]:
        chance = self.folder / "chance"
        chance.write_bytes(random.Random(SEED).randbytes(40 * MIB))
        return ["-smp", "200", "-S", "-device", f"loader,file={chance},addr={16 * MIB:#x},force-raw=on"]


def saved_many(work: Path) -> tuple[bytes, int]:
    """The state of such a guest, which is in the file `s`, and where its end mark stands."""
    with Many(work, "a", accel="tcg", net=[]).start(timeout=120) as guest:
        save(guest, work / "s")
    state = (work / "s").read_bytes()
    place = description_at_end(state)
    assert place
    mark, description = place
    assert len(state) - description > MIB
    return state, mark


def test_200_vcpus(work: Path, gnupg: Path) -> None:
    state, mark = saved_many(work)
    assert shell(f"vm-encrypt -r {KEY} s > m && vm-encrypt -d m | cmp - s", work).status == 0
    message = (work / "m").read_bytes()
    for at in (len(message) - 1, len(message) - 30, len(message) - MIB, len(message) - 10 * MIB, 20 * MIB):
        for wrong in (message[:at], message[:at] + bytes([message[at] ^ 1]) + message[at + 1 :]):
            (work / "m").write_bytes(wrong)
            done = shell("vm-encrypt -d m > out", work)
            assert done.status == 3, done.err
            out = os.path.getsize(work / "out")
            assert out <= len(state) - HOLD < mark
            assert at < 30 * MIB or (out > 0 and state.startswith((work / "out").read_bytes()))
