"""Signatures of webhooks, against the published vector and a receiver written from the specification."""

from __future__ import annotations

import base64
import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.courier.receiver import verified
from workers.courier.signing import SecretError, read_secret, secrets_of, sign

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
KEYS = st.binary(min_size=24, max_size=64).map(lambda key: f"whsec_{base64.b64encode(key).decode()}")


def test_the_published_vector() -> None:
    """The example that the libraries of Standard Webhooks are tested with."""
    headers = sign([SECRET], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


@given(st.lists(KEYS, min_size=1, max_size=3), st.binary(max_size=200), st.integers(0, 2**33), st.data())
def test_each_secret_verifies_and_no_other(secrets: list[str], body: bytes, second: int, data: st.DataObject) -> None:
    """While a key is replaced, holders of the old and of the new one both verify; others, and other bodies, do not."""
    headers = sign(secrets, "msg_job_1_2", second, body)
    assert all(verified(secret, headers, body, now=second) for secret in secrets)
    stranger = data.draw(KEYS.filter(lambda key: key not in secrets))
    assert not verified(stranger, headers, body, now=second)
    assert not verified(secrets[0], headers, body + b" ", now=second)
    assert not verified(secrets[0], {**headers, "webhook-id": "msg_job_1_3"}, body, now=second)
    assert not verified(secrets[0], headers, body, now=second + 301)


@pytest.mark.parametrize(
    "text",
    ["", "whsec_", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_MfKQ", SECRET + "é", SECRET[:-1], "whsec_" + "A" * 92],
)
def test_what_is_no_secret_is_refused(text: str) -> None:
    """A key that is too short, damaged or without its prefix signs nothing, and is not repeated."""
    with pytest.raises(SecretError) as caught:
        read_secret(text)
    assert text == "" or text not in str(caught.value).removeprefix("a webhook secret is whsec_")


def test_nothing_is_sent_unsigned() -> None:
    """A tenant without a secret gets no message that anybody could have written."""
    with pytest.raises(SecretError):
        sign([], "msg_1", 0, b"")


def test_tenants_have_secrets_of_their_own() -> None:
    """Each tenant verifies only its own messages; the sole tenant's are the configured ones."""
    second = "whsec_" + base64.b64encode(bytes(32)).decode()
    configured = [SECRET, second]
    assert secrets_of(configured, "default") == (SECRET, second)
    a, b = secrets_of(configured, "a"), secrets_of(configured, "b")
    assert len({*configured, *a, *b}) == 6
    assert secrets_of(configured, "a") == a
    key = hmac.new(read_secret(SECRET), b"dreamserve webhooks of a", hashlib.sha256).digest()
    assert read_secret(a[0]) == key
