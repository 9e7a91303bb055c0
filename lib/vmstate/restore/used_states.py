"""A file with the states of which a guest was made already, so that none is used twice."""

import fcntl
import os
import time

from ..errors import CannotDo, Misfit


class UsedStates:
    """A file with a line for each state of which a guest was made: its identity, and when."""

    def __init__(self, path: str) -> None:
        self._path = path

    def require_new(self, name: str) -> None:
        """Misfit where the state `name` is there."""
        try:
            with open(self._path, encoding="utf-8") as file:
                self._look(name, file.read())
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            raise CannotDo(f"cannot read {self._path}: {error}") from error

    def note(self, name: str) -> None:
        """The same, and write it down, before anybody else can; it is on the disk then."""
        try:
            with open(self._path, "a+", encoding="utf-8") as file:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX)
                file.seek(0)
                self._look(name, file.read())
                file.write(f"{name} {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}\n")
                file.flush()
                os.fsync(file.fileno())
        except (OSError, ValueError) as error:
            raise CannotDo(f"cannot write {self._path}: {error}") from error

    def _look(self, name: str, text: str) -> None:
        for line in text.splitlines():
            words = line.split()
            if words and words[0] == name:
                told = f"a guest was made of this state already ({' '.join(words[1:])}), as {self._path} has it"
                hint = f"its disks have gone on since; if that guest never ran, take the line out of {self._path}"
                raise Misfit(told, hint)
