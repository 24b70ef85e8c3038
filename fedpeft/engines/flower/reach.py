"""How a site reaches its server's gate, and what it makes of a refusal, before it has a session."""

import ssl
import time
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Final, final

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from fedpeft.errors import BadInput

NOT_ACTIVATED: Final = 2004
"""Flower's code where a key is not registered, or is online already; it does not say which."""
AGAIN: Final = 75.0
"""Seconds for which a site asks again with a key that is online: so long, and a little more, the
SuperLink takes a site for online that was killed."""
UNREACHED: Final = 503
"""The status of a gate that has not reached the SuperLink: nothing was done."""
UNANSWERED: Final = 504
"""The status of a gate that waits for the SuperLink's answer in vain: it may have done what it was
asked. So it may have with every other status that tells of trouble, as of another proxy."""
NOT_SENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
"""Errors after which nobody can have done anything."""
KEY_ROUTE: Final = "/v1/fedpeft/key"
"""Where the embedded gate tells whether a key is registered."""
OFFER_ROUTE: Final = "/v1/fedpeft/offer"
"""Where the embedded gate tells registered sites what is offered."""


@final
@dataclass(frozen=True)
class Gate:
    """How a site reaches its server: host, port, the CA's certificate (PEM), its own key."""

    host: str
    port: int
    ca: bytes
    key: ec.EllipticCurvePrivateKey

    @property
    def address(self) -> str:
        """Return host and port as Flower writes them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def tls(self) -> ssl.SSLContext:
        """Return the context in which the server's certificate is checked against the CA."""
        return ssl.create_default_context(cadata=self.ca.decode("ascii"))


def is_down(status: int) -> bool:
    """Return whether a status tells of trouble at the server, which passes: sites try again.

    So is the SuperLink's while it is restarted, or has no room for what it wants to write.

    >>> is_down(503), is_down(401)
    (True, False)
    """
    return status >= httpx.codes.INTERNAL_SERVER_ERROR


def public_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return the public half of a site's key as Flower's messages hold it."""
    return public_key_to_bytes(key.public_key())


def refused(response: httpx.Response, gate: Gate, waited: float) -> str:
    """Return what to say while waiting after a refusal; BadInput where waiting is of no use."""
    status, code = response.status_code, error_code(response)
    if is_down(status):
        return f"waiting for the server at {gate.address} (status {status})"
    if status == httpx.codes.UNAUTHORIZED:
        raise BadInput(
            f"server = {gate.address!r}: refuses the signature of this site; "
            f"{clock_fault(response) or 'its clock and this one must agree within 5 s'}"
        )
    if code == NOT_ACTIVATED:
        known = key_is_known(gate)
        if known is False:
            raise BadInput(
                f"key: the server at {gate.address} does not know this site's key; give its "
                "public half (the .pub file) to whoever runs the server"
            )
        if known and key_is_taken_in(gate) is False:
            return "the server takes this site's key in before its next round; waiting for that"
        if waited < AGAIN:
            return "the server takes this site for online still, as after a crash; trying again"
        raise BadInput(
            f"key: the server at {gate.address} has had a site with this key online for "
            f"{AGAIN:g} s, or does not know the key; is the site running twice?"
        )
    raise BadInput(f"server = {gate.address!r}: refuses this site (status {status}, code {code})")


def error_code(response: httpx.Response) -> int | None:
    """Return Flower's code of an error; None where there is none."""
    try:
        content = response.json()
    except ValueError:
        return None
    code = content.get("code") if isinstance(content, dict) else None
    return code if isinstance(code, int) else None


def clock_fault(response: httpx.Response) -> str:
    """Return by how much the server's clock differs from this one; empty where it does not."""
    try:
        there = parsedate_to_datetime(response.headers["date"]).timestamp()
    except (KeyError, ValueError):
        return ""
    ahead = time.time() - there
    if abs(ahead) < 4:
        return ""
    return f"the clock here is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} its own"


def tls_fault(error: BaseException) -> str:
    """Return what is wrong with the server's TLS; empty where the error is of another kind."""
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        if "ostname mismatch" in text or "IP address mismatch" in text:
            return "its certificate is for another name; see the names in deploy init --host"
        if "expired" in text:
            return "its certificate has expired"
        return "its certificate is not signed by the CA in `ca`; get that file from the server"
    if "WRONG_VERSION_NUMBER" in text or "record layer failure" in text:
        return "does not speak TLS there; is it the gate's port?"
    if "ssl" in text.lower() or "tls" in text.lower():
        return f"TLS fails ({' '.join(text.split())[:120]})"
    return ""


def key_is_known(gate: Gate) -> bool | None:
    """Return whether the server knows the site's key; None where its gate does not tell."""
    return _told_of_key(gate, "registered")


def key_is_taken_in(gate: Gate) -> bool | None:
    """Return whether the SuperLink has the key, too, which it gets between two rounds."""
    return _told_of_key(gate, "taken_in")


def _told_of_key(gate: Gate, what: str) -> bool | None:
    """Return what the server tells of the site's key; None where its gate does not tell."""
    try:
        said = _asked(gate, KEY_ROUTE)[what]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None
    return said if isinstance(said, bool) else None


def offered(gate: Gate) -> Mapping[str, Any]:
    """Return what the server offers now; empty where it offers nothing, or its gate is another."""
    try:
        content = _asked(gate, OFFER_ROUTE)
    except (httpx.HTTPError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def probe(gate: Gate) -> httpx.Response:
    """Return the gate's answer to a question that it answers to everybody; errors are httpx's."""
    with httpx.Client(verify=gate.tls(), timeout=10.0) as client:
        return client.get(f"https://{gate.address}{KEY_ROUTE}")


def _asked(gate: Gate, route: str) -> Any:
    """Return what the embedded gate says, as JSON; the question is signed as Flower does it."""
    said = now().isoformat()
    headers = {
        "flwr-public-key": b64encode(public_bytes(gate.key)).decode("ascii"),
        "flwr-timestamp": said,
        "flwr-signature": b64encode(sign_message(gate.key, said.encode("ascii"))).decode("ascii"),
    }
    with httpx.Client(verify=gate.tls(), timeout=10.0) as client:
        response = client.get(f"https://{gate.address}{route}", headers=headers)
        response.raise_for_status()
        return response.json()
