"""A status line of gpg with too few fields is an error that names it, whatever it is."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vmstate.encrypt.gpg import LEAST, Verdict
from vmstate.encrypt.verdict import check_encryption, decryption_error, signatures_of
from vmstate.errors import Damaged, VmstateError

KEYS = (*LEAST, "PLAINTEXT", "BEGIN_DECRYPTION", "DECRYPTION_OKAY", "END_ENCRYPTION", "NODATA", "UNEXPECTED")
WORDS = st.lists(st.sampled_from(("0", "9", "10", "A" * 40, "pkdecrypt_failed", "get_passphrase", "-")), max_size=10)


def heard(*lines: tuple[str, str]) -> tuple[Verdict, list[BaseException]]:
    failed: list[BaseException] = []
    verdict = Verdict(SimpleNamespace(fail=failed.append))  # type: ignore[arg-type]
    for key, value in lines:
        verdict.handle_status(key, value)
    return verdict, failed


@pytest.mark.parametrize("key", LEAST)
def test_one_that_is_too_short(key: str) -> None:
    value = " ".join(["1"] * (LEAST[key] - 1))
    verdict, failed = heard((key, value))
    assert verdict.said == []
    (error,) = failed
    assert isinstance(error, Damaged)
    assert str(error) == f"gpg's status line '{key} {value}': expected at least {LEAST[key]} fields"


@given(st.lists(st.tuples(st.sampled_from(KEYS), WORDS.map(" ".join))))
def test_whatever_it_says_is_judged(lines: list[tuple[str, str]]) -> None:
    verdict, _ = heard(*lines)
    verdict.returncode = 2
    decryption_error(verdict, signatures_of(verdict), ["A" * 40])
    try:
        check_encryption(verdict)
    except VmstateError as error:
        assert str(error)
