"""Plays Istio's own node agent in ambient mode by what is documented of it: files, conf entry, sockets, order.

Runs in a container with Istio's own manifest, on the host's Python and its standard library alone. What it does not
play is written by the tests themselves: rules in pods and on the host, annotations. Pods for ztunnel are listed in
PODS, which a test writes.
"""

from __future__ import annotations

import array
import base64
import json
import os
import shutil
import signal
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

SOURCE, TARGET = Path("/opt/cni/bin/istio-cni"), Path("/host/opt/cni/bin/istio-cni")
CONFS, RUN = Path("/host/etc/cni/net.d"), Path("/var/run/istio-cni")
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
ZTUNNEL = "/var/run/ztunnel/ztunnel.sock"
PODS = RUN / "original-pods.json"
FOUND = RUN / "original-found.json"  # what was there when it started
SOCKETS = {
    str(RUN / "log.sock"): socket.SOCK_STREAM,
    ZTUNNEL: socket.SOCK_SEQPACKET,
    str(RUN / "pluginevent.sock"): socket.SOCK_STREAM,
}
SELECTORS = [
    {"podSelector": {"matchLabels": {"istio.io/dataplane-mode": "ambient"}}, "namespaceSelector": {}},
    {
        "podSelector": {
            "matchExpressions": [{"key": "istio.io/dataplane-mode", "operator": "NotIn", "values": ["none"]}]
        },
        "namespaceSelector": {"matchLabels": {"istio.io/dataplane-mode": "ambient"}},
    },
]
# Ours is compared with it too (tests/agent/test_contract_files.py); it is here because the image holds this file alone.
KUBECONFIG = """\
apiVersion: v1
clusters:
- cluster:
    {trust}
    server: {server}
  name: local
contexts:
- context:
    cluster: local
    user: istio-cni
  name: istio-cni-context
current-context: istio-cni-context
kind: Config
users:
- name: istio-cni
  user:
    token: {token}
"""


def say(text: str) -> None:
    print(text, flush=True)


# --- files ------------------------------------------------------------------------------------------------------------


def write(path: Path, text: str, mode: int) -> None:
    partial = path.with_name(f"{path.name}.tmp.1")
    partial.touch(mode=mode)
    partial.write_text(text)
    partial.rename(path)


def look() -> None:
    """Note what the agent before it has left."""
    kubeconfig = RUN / "istio-cni-kubeconfig"
    found = {
        "sockets": {path: state_of(path, kind) for path, kind in SOCKETS.items()},
        "confs": {path.name: path.read_text() for path in CONFS.iterdir()},
        "kubeconfig": kubeconfig.read_text() if kubeconfig.exists() else None,
        "plugin": TARGET.exists(),
    }
    FOUND.write_text(json.dumps(found))


def state_of(path: str, kind: int) -> str:
    with socket.socket(socket.AF_UNIX, kind) as client:
        try:
            client.connect(path)
        except FileNotFoundError:
            return "absent"
        except ConnectionRefusedError:
            return "stale"
    return "in use"


def install() -> None:
    partial = TARGET.with_name("istio-cni.tmp.1")
    shutil.copy2(SOURCE, partial)
    partial.rename(TARGET)
    server = f"https://{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}"
    ca, token = ((ACCOUNT / name).read_text() for name in ("ca.crt", "token"))
    write(RUN / "istio-cni-kubeconfig", KUBECONFIG.format(trust=trust(ca), server=server, token=token), 0o600)
    path = sorted([*CONFS.glob("*.conf"), *CONFS.glob("*.conflist")])[0]
    document = json.loads(path.read_text())
    # the first round always writes, because no path is known yet: our entry goes, a new one comes
    document["plugins"] = [plugin for plugin in document["plugins"] if plugin["type"] != "istio-cni"] + [entry()]
    write(path, json.dumps(document, indent=2, sort_keys=True) + "\n", path.stat().st_mode & 0o777)
    say(f"wrote {path}")


def trust(ca: str) -> str:
    """The kubeconfig's line about the server's certificate."""
    return f"certificate-authority-data: {base64.b64encode(ca.encode()).decode()}"


def entry() -> dict[str, object]:
    return {
        "ambient_enabled": os.environ["AMBIENT_ENABLED"] == "true",
        "cni_agent_run_dir": "/var/run/istio-cni",
        "dns": {},
        "enable_ambient_detection_retry": False,
        "enablement_selectors": SELECTORS,
        "exclude_namespaces": os.environ["EXCLUDE_NAMESPACES"].split(","),
        "ipam": {},
        "name": "istio-cni",
        "native_nftables": os.environ["NATIVE_NFTABLES"] == "true",
        "plugin_log_level": "info",
        "pod_namespace": os.environ["POD_NAMESPACE"],
        "type": "istio-cni",
    }


# --- sockets ----------------------------------------------------------------------------------------------------------


def listen(path: str, kind: int) -> socket.socket:
    """As the original: whatever is there is removed."""
    Path(path).unlink(missing_ok=True)
    made = socket.socket(socket.AF_UNIX, kind)
    made.bind(path)
    made.listen(16)
    return made


def field(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | 2, len(data)]) + data


def serve_ztunnel(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=tell_ztunnel, args=(connection,), daemon=True).start()


def tell_ztunnel(connection: socket.socket) -> None:
    """The snapshot: an Add with the netns for each pod, then SnapshotSent; nothing comes after it."""
    if connection.recv(65536) != b"\x08\x01":
        say("no hello")
        return
    pods = json.loads(PODS.read_text()) if PODS.exists() else []
    for pod in pods:
        info = field(1, pod["name"].encode()) + field(2, pod["namespace"].encode()) + field(3, b"default")
        message = field(1, field(1, pod["uid"].encode()) + field(2, info))
        netns = os.open(f"/host/var/run/netns/{pod['netns']}", os.O_RDONLY)
        descriptors = array.array("i", [netns])
        connection.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
        os.close(netns)
        say(f"ztunnel answers {connection.recv(65536)!r} to {pod['name']}")
    connection.send(b"\x1a\x00")
    say(f"ztunnel answers {connection.recv(65536)!r} to the snapshot of {len(pods)}")
    connection.recv(65536)


class Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if ready.is_set() else 503)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


ready = threading.Event()


def main() -> None:
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    threading.Thread(target=HTTPServer(("", 8000), Health).serve_forever, daemon=True).start()
    look()
    listeners = {path: listen(path, kind) for path, kind in SOCKETS.items()}
    for path in (RUN / "log.sock", RUN / "pluginevent.sock"):
        path.chmod(0o666)
    threading.Thread(target=serve_ztunnel, args=(listeners[ZTUNNEL],), daemon=True).start()
    install()
    ready.set()
    say("ready")
    ended.wait()
    # An upgrade, as far as it knows: plugin, conf and kubeconfig stay, sockets go with their listeners.
    for path in SOCKETS:
        Path(path).unlink(missing_ok=True)
    say("ended")


if __name__ == "__main__":
    sys.exit(main())
