"""What the frames of a link say, read at one door: each field is of its type and within its limits, or is named.

Source: docs/link.md, "What they say".  A field that is not known here is passed over: a later version may have more.
"""

from typing import Any, NamedTuple

from ..errors import CannotDo, Damaged, InDoubt, Misfit, VmstateError
from ..fields import Fields
from ..report import printable
from . import proof
from .finding import Finding
from .link import VERSION, LinkFrame

# The number of a move, as its source has drawn it.
MOVE = "[0-9a-f]{16}"
# A run state of QEMU, or a state of docs/link.md.
STATE = "[a-z][a-z-]{0,31}"
# Of a path, of the name of a host, and of words for a person.
PATH, HOST, WORDS = 4096, 255, 64 << 10
# More than an honest other side has to say at once.
FILTERS, HINTS, FINDINGS = 8, 64, 4096
# Of each purpose, whether its hello must name the move.
PURPOSES = {"move": True, "check": False, "settle": False, "grant": True, "resume": True}
# Of a receiver's status, the error that it is on our side.
FAMILY: dict[int, type[VmstateError]] = {1: CannotDo, 2: CannotDo, 3: Damaged, 4: Misfit, 5: InDoubt}


class Origin(NamedTuple):
    """Where a guest comes from, for people to read; empty where its source does not say."""

    host: str
    path: str


class Hello(NamedTuple):
    """move: "" where the purpose needs none.  facts: what `preflight.compare` judges, each part by itself.

    run: whether the guest ran.  through: the names of the filters on the way.  secret: of a migration that begins,
    nonce: of a conversation about one that was begun before; "" for any other.
    """

    purpose: str
    move: str
    facts: dict[str, Any]
    run: bool
    through: list[str]
    announce: bool
    clock: bool
    postcopy: bool
    origin: Origin
    secret: str = ""
    nonce: str = ""

    @classmethod
    def of(cls, frame: LinkFrame) -> "Hello":
        """CannotDo for another version or purpose, Damaged for what is wrong."""
        fields = Fields(frame.values, "the source's hello", Damaged)
        version = fields.whole("version")
        # First: what another version says may be of other types.
        if version != VERSION:
            raise CannotDo(f"the source speaks version {version} of the link, this side version {VERSION}")
        purpose = fields.text("purpose", most=HOST)
        if purpose not in PURPOSES:
            raise CannotDo(f"the source asks for '{purpose}', which this version does not know")
        origin, facts = fields.inner("from", None), fields.inner("facts", None)
        return cls(
            purpose,
            fields.text("move", pattern=MOVE) if PURPOSES[purpose] else fields.text("move", "", pattern=MOVE),
            facts.raw() if facts else {},
            fields.flag("run", True),
            fields.texts("through", most=FILTERS),
            fields.flag("announce", True),
            fields.flag("clock", False),
            fields.flag("postcopy", False),
            Origin(origin.text("host", "", most=HOST), origin.text("path", "", most=PATH))
            if origin
            else Origin("", ""),
            fields.secret("secret", pattern=proof.SECRET) if purpose == "move" else "",
            fields.text("nonce", "", pattern=proof.NONCE) if purpose in proof.MARKERS else "",
        )


class Accepted(NamedTuple):
    """A receiver would take the guest; what it has found that may be in the way."""

    findings: list[Finding]

    @classmethod
    def of(cls, frame: LinkFrame) -> "Accepted":
        fields = Fields(frame.values, "the other side's answer")
        return cls([_finding(one) for one in fields.objects("findings", most=FINDINGS)])


class Stand(NamedTuple):
    """Where the guest of a migration stands on the side that was asked: `state` is a row of docs/link.md.

    run: QEMU's run state, or "".  proof: that this is said by one who has the secret.
    """

    state: str
    run: str
    proof: str

    @classmethod
    def of(cls, frame: LinkFrame) -> "Stand":
        fields = Fields(frame.values, "the other side's answer")
        # An empty text is none, too.
        run = fields.text("run", pattern=STATE) if fields.get("run") else ""
        return cls(fields.text("state", pattern=STATE), run, fields.text("proof", pattern=proof.PROOF))


class Challenge(NamedTuple):
    """nonce: of the side that is asked about a migration."""

    nonce: str

    @classmethod
    def of(cls, frame: LinkFrame) -> "Challenge":
        return cls(Fields(frame.values, "the other side's challenge").text("nonce", pattern=proof.NONCE))


class Proof(NamedTuple):
    """proof: that the secret of a migration is known to who asks about it."""

    proof: str

    @classmethod
    def of(cls, frame: LinkFrame) -> "Proof":
        return cls(Fields(frame.values, "the proof", Damaged).text("proof", pattern=proof.PROOF))


class Loaded(NamedTuple):
    """bytes: of the stream, behind the filters."""

    bytes: int

    @classmethod
    def of(cls, frame: LinkFrame) -> "Loaded":
        return cls(Fields(frame.values, "the other side's 'loaded'").whole("bytes", 0))


class Go(NamedTuple):
    """The guest is let go here: whatever is wrong with it, it is in doubt.

    proof: "" in the conversation in which the guest has come.
    """

    move: str
    proof: str

    @classmethod
    def of(cls, frame: LinkFrame) -> "Go":
        fields = Fields(frame.values, "the source's 'go'", InDoubt)
        return cls(fields.text("move", pattern=MOVE), fields.text("proof", "", pattern=proof.PROOF))


class Running(NamedTuple):
    """state: QEMU's run state there.  The guest has been let go: whatever is wrong with it, it is in doubt.

    proof: as in `Go`.
    """

    state: str
    proof: str

    @classmethod
    def of(cls, frame: LinkFrame) -> "Running":
        fields = Fields(frame.values, "the other side's 'running'", InDoubt)
        return cls(fields.text("state", pattern=STATE), fields.text("proof", "", pattern=proof.PROOF))


def _finding(fields: Fields) -> Finding:
    """What has no known level is an error."""
    level = "warning" if fields.text("level", "", most=HOST) == "warning" else "error"
    return Finding(level, *(printable(fields.text(name, "", most=WORDS)) for name in ("text", "hint")))


def told(findings: list[Finding]) -> list[dict[str, str]]:
    """Findings of ours, as the other side is told them: those that count for most, where there are too many."""
    return [finding.as_dict() for finding in findings[:FINDINGS]]


def refusal(error: VmstateError) -> dict[str, Any]:
    """An error of ours, as the other side is told it."""
    hints = [hint[:WORDS] for hint in error.hints[:HINTS]]
    unknown = {"unknown": True} if isinstance(error, proof.Unknown) else {}
    return {"status": error.status, "message": str(error)[:WORDS], "hints": hints, **unknown}


def refused(frame: LinkFrame) -> VmstateError:
    """What the other side has refused, as an error of ours; also where that is not said as it should be."""
    try:
        fields = Fields(frame.values, "the other side's refusal")
        family = FAMILY.get(fields.whole("status", 1), CannotDo)
        message = fields.text("message", "it gave no reason", most=WORDS)
        if fields.flag("unknown", False):
            return proof.Unknown(f"the other side: {message}")
        return family(f"the other side: {message}", *fields.texts("hints", most=HINTS, longest=WORDS))
    except VmstateError as wrong:
        return wrong
