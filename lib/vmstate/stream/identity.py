"""Which state it is, however it was packed or moved: told by its devices, which hold the moment."""

import xxhash

from .validate import State


def identity(state: State) -> str:
    """32 hexadecimal digits: XXH3-128 over the device sections, each with its name and length before it."""
    digest = xxhash.xxh3_128()
    for part in state.parts:
        digest.update(f"{part.name}/{part.instance}/{len(part.payload)}/".encode())
        digest.update(part.payload)
    return str(digest.hexdigest())
