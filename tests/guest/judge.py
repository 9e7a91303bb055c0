"""Verdicts on guests at both ends of a pipeline."""

from vm import Guest


def went_on(source_count: int, guest: Guest) -> None:
    """The guest runs, its counter went on from where it stood, and its RAM is what it was."""
    first = guest.wait_count(source_count + 1)
    counts = guest.counts()
    assert counts[0] in range(source_count, source_count + 3), f"stood at {source_count}, went on at {counts[:3]}"
    assert first > source_count
    assert guest.running()
    guest.wait_sum()
    assert len(set(guest.sums())) == 1


def ram(guest: Guest, begin: int = 1 << 20) -> bytes:
    """What QEMU itself says is in its RAM, from where nothing hides it."""
    path = guest.path("pmem")
    with guest.connect(timeout=60) as qmp:
        qmp.cmd("pmemsave", val=begin, size=(guest.mem << 20) - begin, filename=str(path))
    return path.read_bytes()


def same_memory(source: Guest, guest: Guest) -> None:
    assert guest.wait_sum() == source.sums()[-1]


def as_it_was(guest: Guest) -> None:
    """A guest that ran runs on by itself, its memory whole, and nothing is left switched on in its QEMU."""
    assert guest.running(), guest.status()
    assert guest.errors() == 0
    capabilities = guest.cmd("query-migrate-capabilities")
    assert not [c for c in capabilities if c["state"]], capabilities
    parameters = guest.cmd("query-migrate-parameters")
    assert parameters["max-bandwidth"] == 128 << 20
    assert parameters["downtime-limit"] == 300


def still_waits(guest: Guest) -> None:
    assert guest.status() == "inmigrate"
    assert guest.cmd("query-migrate").get("status", "none") == "none"


def used_up(guest: Guest) -> bool:
    """It has begun to load: over a failure QEMU 7.2 ends, 10.0 stays with it, and neither can load again."""
    try:
        return guest.status() != "inmigrate" or guest.cmd("query-migrate").get("status", "none") != "none"
    except OSError:
        # It ends just now.
        return True
