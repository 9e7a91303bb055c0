"""Any bytes as a state, led by coverage, from the small real states on: refused or looked through, and nothing else.

    python tests/fuzz/fuzz_stream.py FOLDER -max_total_time=60

FOLDER keeps what was found, so that the next run goes on from there; other arguments are libFuzzer's.
"""

import json
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

with atheris.instrument_imports(include=["vmstate"]):
    from vmstate.errors import Damaged
    from vmstate.inspect.summary import survey

from unit.streams import Pieces, names, state  # noqa: E402

# Larger states are slower, and have nothing in them that is in none of these.
SEED_LIMIT = 600_000
LIMITS = ["-timeout=10", "-rss_limit_mb=1024", f"-max_len={SEED_LIMIT}", "-print_final_stats=1"]


def one(data: bytes) -> None:
    try:
        # The judge and all behind it: numbers of pages, fields of devices.
        json.dumps(survey(Pieces(data)).everything())
    except Damaged as error:
        assert str(error)


def main() -> None:
    folder = Path(sys.argv[1])
    seeds = folder / "seeds"
    seeds.mkdir(parents=True, exist_ok=True)
    (folder / "corpus").mkdir(exist_ok=True)
    for name in names():
        if len(state(name)) <= SEED_LIMIT:
            (seeds / name).write_bytes(state(name))
    options = [*LIMITS, f"-artifact_prefix={folder}/", *sys.argv[2:]]
    atheris.Setup([sys.argv[0], str(folder / "corpus"), str(seeds), *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
