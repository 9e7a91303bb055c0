"""The tests here need QEMU and the test guest: minutes, not seconds."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/guest/" in str(item.path):
            item.add_marker(pytest.mark.guest)
            item.add_marker(pytest.mark.timeout(240))
