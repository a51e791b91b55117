"""ztunnel's sockets in a pod, in small: run by Debian's own Python inside the pod with this text as its `-c` argument.

All its sockets carry ztunnel's mark. It connects to where a captured connection wanted to go, inbound from the client's
own address, and puts one line before the answer: `inbound ADDRESS PORT` or `outbound ADDRESS PORT`. Port 15008 answers
`tunnelled`, DNS (15053 on loopback) `dns ADDRESS PORT` over TCP and `answered by ztunnel` over UDP.
"""

import socket
import struct
import threading
from collections.abc import Callable

SO_ORIGINAL_DST = 80  # linux/netfilter_ipv4.h, and IP6T_SO_ORIGINAL_DST
IPV6_TRANSPARENT = 75  # linux/in6.h
MARK = 0x539
OWN_PORTS = (15001, 15006, 15008, 15053)
MAX_CONNECTIONS = 500  # were the rules to lead our own connections back to us, this ends it
LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


def marked(family: int, kind: int = socket.SOCK_STREAM, transparent: bool = False) -> socket.socket:
    made = socket.socket(family, kind)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    if transparent and family == socket.AF_INET:
        made.setsockopt(socket.SOL_IP, socket.IP_TRANSPARENT, 1)
    elif transparent:
        made.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
    return made


def original_destination(connection: socket.socket) -> tuple[str, int]:
    try:
        if connection.family == socket.AF_INET:
            answer = connection.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)
            _family, port, packed = struct.unpack("!HH4s8x", answer)
        else:
            answer = connection.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28)
            _family, port, _flow, packed, _scope = struct.unpack("!HHI16sI", answer)
    except OSError:  # not tracked, or not redirected
        return connection.getsockname()[:2]
    return socket.inet_ntop(connection.family, packed), port


def forward(connection: socket.socket, direction: str) -> None:
    with connection:
        address, port = original_destination(connection)
        answer = f"{direction} {address} {port}\n".encode()
        if port in OWN_PORTS:
            connection.sendall(answer + b"a loop\n")
            return
        with marked(connection.family, transparent=direction == "inbound") as upstream:
            upstream.settimeout(5)
            try:
                if direction == "inbound":
                    upstream.bind((connection.getpeername()[0], 0))
                upstream.connect((address, port))
                while data := upstream.recv(4096):
                    answer += data
            except OSError as error:
                answer += f"{error}\n".encode()
        connection.sendall(answer)


def answer_tunnelled(connection: socket.socket, _name: str) -> None:
    with connection:
        connection.sendall(b"tunnelled\n")


def answer_question(connection: socket.socket, _name: str) -> None:
    with connection:
        address, port = original_destination(connection)
        connection.sendall(f"dns {address} {port}\n".encode())


def serve(family: int, host: str, port: int, handle: Callable[[socket.socket, str], None], name: str) -> None:
    listener = marked(family, transparent=True)
    listener.bind((host, port))
    listener.listen(64)

    def loop() -> None:
        for _number in range(MAX_CONNECTIONS):
            connection, _peer = listener.accept()
            threading.Thread(target=handle, args=(connection, name), daemon=True).start()

    threading.Thread(target=loop, daemon=True).start()


def answer_datagrams(family: int) -> None:
    server = marked(family, socket.SOCK_DGRAM)
    server.bind((LOOPBACK[family], 15053))

    def loop() -> None:
        for _number in range(MAX_CONNECTIONS):
            _data, peer = server.recvfrom(512)
            server.sendto(b"answered by ztunnel", peer)

    threading.Thread(target=loop, daemon=True).start()


def main() -> None:
    for family in (socket.AF_INET, socket.AF_INET6):
        serve(family, "", 15001, forward, "outbound")
        serve(family, "", 15006, forward, "inbound")
        serve(family, "", 15008, answer_tunnelled, "")
        serve(family, LOOPBACK[family], 15053, answer_question, "")
        answer_datagrams(family)
    print("ready", flush=True)
    threading.Event().wait()


main()
