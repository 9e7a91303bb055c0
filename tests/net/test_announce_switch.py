"""vm-announce with a real Open vSwitch, by its datapath that needs nothing of the kernel."""

import contextlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from vmstate.net.nic import Nic

from net import wires
from net.wires import COMMAND, ENVIRONMENT, ONE, TWO, WAIT, Namespace, of, sh, until

pytestmark = pytest.mark.root
namespaces = wires.namespaces
SCHEMA = "/usr/share/openvswitch/vswitch.ovsschema"
ONCE = ("--rounds", "1", "--as-is")


@dataclass
class Switch:
    """A bridge br0 on `host` with the ports up0, to `lan`, and tap0; the daemons are in `folder`."""

    host: Namespace
    lan: Namespace
    folder: Path

    @property
    def environment(self):
        return {**ENVIRONMENT, "OVS_RUNDIR": str(self.folder)}

    def ask(self, *words):
        return sh(*words, env=self.environment)

    def announce(self, *words):
        command = self.host.command(*COMMAND, *words)
        return subprocess.run(command, capture_output=True, text=True, timeout=WAIT, env=self.environment)

    def port_of(self, mac):
        """As the switch numbers it."""
        table = self.ask("ovs-appctl", "-t", f"{self.folder}/v.ctl", "fdb/show", "br0")
        return [line.split()[0] for line in table.splitlines() if mac in line]

    def number(self, port):
        return self.ask("ovs-vsctl", "get", "interface", port, "ofport").strip()


@pytest.fixture
def switch(namespaces, tmp_path):
    host, lan = namespaces(), namespaces()
    host.ip(f"link add up0 type veth peer name lan0 netns {lan.name}")
    lan.ip("link set lan0 up")
    host.ip("tuntap add tap0 mode tap")
    for name in ("up0", "tap0"):
        host.ip(f"link set {name} up")
    made = Switch(host, lan, tmp_path)
    sh("ovsdb-tool", "create", f"{tmp_path}/conf.db", SCHEMA)
    with contextlib.ExitStack() as daemons:
        base = (
            "ovsdb-server",
            f"{tmp_path}/conf.db",
            f"--remote=punix:{tmp_path}/db.sock",
            f"--unixctl={tmp_path}/db.ctl",
        )
        start(daemons, made, *base)
        until((tmp_path / "db.sock").exists, "the database listens")
        made.ask("ovs-vsctl", "--no-wait", "init")
        start(daemons, made, "ovs-vswitchd", f"unix:{tmp_path}/db.sock", f"--unixctl={tmp_path}/v.ctl")
        words = "add-br br0 -- set bridge br0 datapath_type=netdev -- add-port br0 up0 -- add-port br0 tap0"
        made.ask("ovs-vsctl", f"--timeout={WAIT}", *words.split())
        host.ip("link set br0 up")
        yield made


def start(daemons, made, *command):
    with open(made.folder / f"{command[0]}.log", "wb") as log:
        process = subprocess.Popen(
            made.host.command(*command),
            stdout=log,
            stderr=log,
            env={**made.environment, "OVS_LOGDIR": str(made.folder)},
        )
    daemons.callback(process.wait, WAIT)
    daemons.callback(process.kill)


def test_a_tap_of_a_switch(switch):
    """The network hears it, and the switch has the card at its tap; so also after it was elsewhere."""
    with switch.lan.listening("wire", "lan0") as seen:
        done = switch.announce(*ONCE, ONE, "tap0", "192.0.2.7", "2001:db8::7")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert switch.port_of(ONE) == [switch.number("tap0")]
        for port in ("up0", "tap0"):
            packet = f"in_port={port},packet={of(Nic(TWO, 'x'))[0].hex()},actions=TABLE"
            switch.ask("ovs-ofctl", "packet-out", "br0", packet)
            assert switch.port_of(TWO) == [switch.number(port)]
    assert [frame for frame in seen if frame[6:12] == of(Nic(ONE, "x"))[0][6:12]] == of(
        Nic(ONE, "tap0", ("192.0.2.7", "2001:db8::7"))
    )


def test_its_internal_port_is_no_guests_tap(switch):
    with switch.lan.listening("wire", "lan0") as seen:
        assert switch.announce(*ONCE, ONE, "br0").returncode == 0
    assert seen == of(Nic(ONE, "br0"))
    assert switch.port_of(ONE) == ["LOCAL"]


def test_a_switch_that_has_gone(switch):
    """Its tap is known by no one any longer."""
    for name in ("v.ctl", "db.sock"):
        os.unlink(switch.folder / name)
    done = switch.announce(*ONCE, ONE, "tap0")
    assert done.returncode == 1
    assert "tap tap0 is in no bridge" in done.stderr
