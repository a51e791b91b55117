"""A sidecar proxy in small, run by Debian's own Python as uid 1337 with this text as its `-c` argument.

It connects to where a captured connection wanted to go, as Envoy does (inbound from 127.0.0.6 or ::6, which the rules
let pass), and puts one line before the answer: `inbound ADDRESS PORT` or `outbound ADDRESS PORT`. UDP packets to 15053
are answered with `captured by the proxy`. Argument: REDIRECT or TPROXY.
"""

import socket
import struct
import sys
import threading

SO_ORIGINAL_DST = 80  # linux/netfilter_ipv4.h, and IP6T_SO_ORIGINAL_DST
IPV6_TRANSPARENT = 75  # linux/in6.h
OWN_PORTS = (15001, 15006)
MAX_CONNECTIONS = 500  # were the rules to lead our own connections back to us, this ends it


def original_destination(connection: socket.socket, transparent: bool) -> tuple[str, int]:
    address, port = connection.getsockname()[:2]
    # In TPROXY mode connections of the proxy to its own pod are redirected (nat), all others keep their destination.
    if transparent and port not in OWN_PORTS:
        return address, port
    if connection.family == socket.AF_INET:
        _family, port, packed = struct.unpack("!HH4s8x", connection.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16))
    else:
        answer = connection.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28)
        _family, port, _flow, packed, _scope = struct.unpack("!HHI16sI", answer)
    return socket.inet_ntop(connection.family, packed), port


def forward(connection: socket.socket, direction: str, transparent: bool) -> None:
    with connection:
        address, port = original_destination(connection, transparent)
        answer = f"{direction} {address} {port}\n".encode()
        if port in OWN_PORTS:
            connection.sendall(answer + b"a loop\n")
            return
        with socket.socket(connection.family) as upstream:
            upstream.settimeout(5)
            if direction == "inbound":
                upstream.bind(("127.0.0.6" if connection.family == socket.AF_INET else "::6", 0))
            try:
                upstream.connect((address, port))
                while data := upstream.recv(4096):
                    answer += data
            except OSError as error:
                answer += f"{error}\n".encode()
        connection.sendall(answer)


def listen(family: int, port: int, transparent: bool) -> socket.socket:
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    if transparent:
        level, option = (
            (socket.SOL_IP, socket.IP_TRANSPARENT)
            if family == socket.AF_INET
            else (socket.IPPROTO_IPV6, IPV6_TRANSPARENT)
        )
        listener.setsockopt(level, option, 1)
    listener.bind(("", port))
    listener.listen(64)
    return listener


def serve(listener: socket.socket, direction: str, transparent: bool) -> None:
    for _number in range(MAX_CONNECTIONS):
        connection, _peer = listener.accept()
        threading.Thread(target=forward, args=(connection, direction, transparent), daemon=True).start()


def answer_datagrams() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 15053))  # as the original's agent does: the answer's source has to be this address
        print("ready", flush=True)
        for _number in range(MAX_CONNECTIONS):
            _data, peer = server.recvfrom(512)
            server.sendto(b"captured by the proxy", peer)


def main() -> None:
    transparent = sys.argv[1] == "TPROXY"
    for family in (socket.AF_INET, socket.AF_INET6):
        outbound, inbound = listen(family, 15001, False), listen(family, 15006, transparent)
        threading.Thread(target=serve, args=(outbound, "outbound", False), daemon=True).start()
        threading.Thread(target=serve, args=(inbound, "inbound", transparent), daemon=True).start()
    answer_datagrams()


main()
