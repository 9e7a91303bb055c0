"""One finding of the checks before a migration."""

from typing import NamedTuple

THERE = "start the QEMU there with the same"


class Finding(NamedTuple):
    """What keeps a guest from its move ('error'), or may ('warning'); `hint` says what to do next."""

    level: str
    text: str
    hint: str = ""

    def as_dict(self) -> dict[str, str]:
        return self._asdict()


def new_error(text: str, hint: str) -> Finding:
    return Finding("error", text, hint)


def new_warning(text: str, hint: str) -> Finding:
    return Finding("warning", text, hint)
