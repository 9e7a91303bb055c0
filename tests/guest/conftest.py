"""The tests here need QEMU and the test guest: minutes, not seconds."""

from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/guest/" in str(item.path):
            item.add_marker(pytest.mark.guest)
            item.add_marker(pytest.mark.timeout(240))


@pytest.fixture
def forbidden() -> Iterator[None]:
    """userfaultfd is for root alone, as on a fresh system."""
    allowed = Path("/proc/sys/vm/unprivileged_userfaultfd")
    before = allowed.read_text()
    allowed.write_text("0")
    yield
    allowed.write_text(before)
