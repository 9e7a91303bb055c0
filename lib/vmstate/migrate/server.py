"""The receiver of a migration over a link (`vm-restore --receive`): one conversation, whatever it is for.

Source: docs/link.md.
"""

import contextlib
from collections.abc import Callable
from typing import Any

from ..errors import CannotDo, Damaged, GuestGone, Misfit, VmstateError
from ..qemu import claim, control, markers, settings
from ..qemu.incoming import require_waiting
from ..qemu.launch import Process, check_arguments, monitor_path
from ..qemu.monitor import Busy, Monitor
from ..qemu.state import query, with_retry
from ..report import Report
from ..signals import hold_signals, no_more_signals, release_signals
from . import decision, filters, finding, link, messages, preflight, proof
from .destination import IncomingMigration
from .link import Link, LinkFrame
from .messages import Go, Hello
from .proof import Talk, Unknown
from .reception import ReceivePlan


class Receive:
    """One conversation over two descriptors, from the other side's hello to its end."""

    def __init__(self, plan: ReceivePlan, report: Report, reading: int, writing: int) -> None:
        self._plan = plan
        self._report = report
        self._link = Link(reading, writing)
        self._process: Process | None = None
        if plan.command:
            check_arguments(plan.command[1:])

    def run(self) -> dict[str, Any]:
        """What came of it, as values; errors are told to the other side as well."""
        try:
            return self._serve()
        except VmstateError as error:
            with contextlib.suppress(OSError):
                self._link.send(link.REFUSE, **messages.refusal(error))
                error.told = True
            raise
        except Exception as error:
            with contextlib.suppress(OSError):
                self._link.send(link.REFUSE, status=1, message=f"internal error: {type(error).__name__}: {error}")
            raise

    def _serve(self) -> dict[str, Any]:
        purposes: dict[str, Callable[[Hello], dict[str, Any]]] = {
            "move": self._move,
            "check": self._check,
            "settle": self._settle,
            "grant": self._grant,
            "resume": self._resume,
        }
        hello = Hello.of(self._expect(link.HELLO, link.ANSWERS))
        return purposes[hello.purpose](hello)

    def _move(self, hello: Hello) -> dict[str, Any]:
        try:
            path, findings = self._look(hello)
            if errors := [finding for finding in findings if finding.level == "error"]:
                raise Misfit(errors[0].text, errors[0].hint)
        except BaseException:
            no_more_signals()
            self._end_process()
            raise
        migration = IncomingMigration(self._plan, path, self._report, self._link, hello, self._process)
        return migration.run(findings)

    def _resume(self, hello: Hello) -> dict[str, Any]:
        path, talk = self._bound(hello)
        migration = IncomingMigration(self._plan, path, self._report, self._link, hello, None)
        return migration.resume(talk.answer("postcopy"))

    def _check(self, hello: Hello) -> dict[str, Any]:
        """As a move, but for the move."""
        try:
            path, findings = self._look(hello)
            self._link.tell(link.ACCEPT, guest=path, findings=messages.told(findings))
            return {"guest": path, "state": "inmigrate"}
        finally:
            self._end_process()

    def _look(self, hello: Hello) -> tuple[str, list[finding.Finding]]:
        """The guest, and what speaks against its taking the source's."""
        filters.inverse(hello.through, self._plan.back)
        path = self._start() if self._plan.command else self._path()
        with Monitor(path) as monitor:
            if hello.purpose == "move":
                claim.take(monitor, path, move=hello.move)
            require_waiting(monitor, path)
            there = preflight.facts(monitor)
        return path, preflight.compare(hello.facts, there)

    def _start(self) -> str:
        hold_signals()
        self._process = Process(self._plan.command)
        release_signals()
        self._process.wait_until_it_answers()
        return self._process.path

    # what a move has left

    def _bound(self, hello: Hello) -> tuple[str, Talk]:
        """The guest that is asked for; Unknown where who asks does not show the secret of its migration."""
        path, nonce = self._path(), proof.draw()
        self._link.tell(link.CHALLENGE, nonce=nonce)
        frame = self._next(link.ANSWERS)
        if frame.kind != link.PROOF:
            raise Unknown
        shown = messages.Proof.of(frame).proof
        try:
            with Monitor(path) as monitor:
                found = markers.read(monitor)
        except Busy as error:
            raise CannotDo("the guest cannot be asked now", "ask again in a moment") from error
        except VmstateError as error:
            raise Unknown from error
        talk = Talk.of(hello.purpose, hello.move, found, hello.nonce, nonce)
        if not talk.proves(shown, "ask"):
            raise Unknown
        return path, talk

    def _settle(self, hello: Hello) -> dict[str, Any]:
        """Say where the guest stands; a source that has granted it may then say go."""
        path, talk = self._bound(hello)
        here = decision.migration_state(path)
        if here.get("move") != hello.move:
            raise Unknown
        state, run = here["state"], here["run"]
        self._link.tell(link.ACCEPT, **talk.answer(state, run))
        while self._link.comes(link.SILENT) and (frame := self._link.receive()):
            if frame.kind == link.GO:
                go = Go.of(frame)
                if go.move != hello.move or not talk.proves(go.proof, "go"):
                    raise Unknown
                run = self._go_after_all(path, hello.move)
                self._link.tell(link.RUNNING, state=run, proof=talk.prove("running", run))
        return {"guest": path, "state": run}

    def _go_after_all(self, path: str, move: str) -> str:
        def go(monitor: Monitor) -> str:
            claim.take(monitor, path, move=move, ours=move)
            found = markers.read(monitor)
            if found.get(markers.ARRIVED, {}).get("move") == move:
                return query(monitor).run
            if found.get(markers.TAKEN, {}).get("move") != move:
                raise CannotDo(f"the guest at {path} is not the one of this move")
            state = decision.arrive(monitor, found[markers.TAKEN])
            with contextlib.suppress(VmstateError):
                settings.clear_leftovers(monitor)
                control.announce(monitor)
            return state

        return with_retry(path, go)

    def _grant(self, hello: Hello) -> dict[str, Any]:
        """Here is the source: let its guest go, if it was given away in this move."""
        path, talk = self._bound(hello)
        try:
            state = with_retry(path, lambda monitor: self._granted(monitor, path, hello.move))
        except GuestGone as error:
            raise Unknown from error
        if state == "unknown":
            raise Unknown
        self._link.tell(link.ACCEPT, **talk.answer(state))
        return {"guest": path, "state": state}

    @staticmethod
    def _granted(monitor: Monitor, path: str, move: str) -> str:
        at_work = claim.another(monitor)
        if not at_work:
            claim.take(monitor, path, move=move)
        # One that is being moved is decided by whoever moves it.
        return decision.grant(monitor, move, decides=not at_work)

    # the talk

    def _path(self) -> str:
        path = self._plan.path or monitor_path(self._plan.command)
        if path is None:
            raise CannotDo("the receiver starts a QEMU of its own, and does not know where one from before is")
        return path

    def _expect(self, kind: int, seconds: float) -> LinkFrame:
        frame = self._next(seconds)
        if frame.kind != kind:
            raise Damaged(f"the source said '{chr(frame.kind)}' where '{chr(kind)}' was expected")
        return frame

    def _next(self, seconds: float) -> LinkFrame:
        if not self._link.comes(seconds):
            raise CannotDo(f"nothing came over the link in {seconds:.0f} s")
        frame = self._link.receive()
        if frame is None:
            raise CannotDo("nothing came over the link: it ended before its source had said hello")
        return frame

    def _end_process(self) -> None:
        if self._process:
            self._process.end()
