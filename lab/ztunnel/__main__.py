"""`python -m lab.ztunnel --socket PATH`: runs until SIGTERM (status 0) or until the agent breaks the protocol (1)."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys

from lab.ztunnel.behaviour import ACTIONS, SYNTAX, Behaviour, Options, parse_fault
from lab.ztunnel.standin import StandIn


def parse(arguments: list[str]) -> Options:
    """The options of a command line; ends the process when they cannot be read."""
    actions = "\n".join(f"  {action:<12}{text}" for action, text in ACTIONS.items())
    parser = argparse.ArgumentParser(
        "lab.ztunnel",
        description=__doc__,
        epilog=f"A fault is {SYNTAX}. Actions:\n{actions}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--socket", required=True, help="the agent's ztunnel.sock")
    parser.add_argument("--control", default="", help="answer orders on this Unix socket, a JSON object a line")
    parser.add_argument("--record", default="", help="append every message to this file, a JSON object a line")
    parser.add_argument("--record-connections", action="store_true", help="and every connection that is led on")
    parser.add_argument("--listen", action="store_true", help="serve pods: listen in their netns and forward")
    parser.add_argument("--ipv4-only", action="store_true", help="listen on 0.0.0.0 instead of [::]")
    parser.add_argument("--name", action="append", default=[], metavar="NAME=ADDRESS", help="answer DNS with this")
    parser.add_argument("--termination-seconds", type=float, default=1.0, help="what connections get after SIGTERM")
    parser.add_argument("--fault", action="append", default=[], type=_fault, help="see below; may be given again")
    parser.add_argument("--silent", action="store_true", help="never say hello")
    parser.add_argument("--close-before-hello", type=int, default=0, metavar="N", help="close the first N connections")
    parser.add_argument("--storm", type=int, default=0, metavar="N", help="close N connections right after the hello")
    parser.add_argument("--unsolicited-seconds", type=float, default=0.0, help="send an ack after so much idle time")
    values = parser.parse_args(arguments)
    behaviour = Behaviour(
        faults=tuple(values.fault),
        silent=values.silent,
        close_before_hello=values.close_before_hello,
        storm=values.storm,
        unsolicited_seconds=values.unsolicited_seconds,
    )
    return Options(
        socket=values.socket,
        record=values.record,
        record_connections=values.record_connections,
        control=values.control,
        listen=values.listen,
        ipv6=not values.ipv4_only,
        names=dict(name.split("=", 1) for name in values.name),
        termination_seconds=values.termination_seconds,
        behaviour=behaviour,
    )


def _fault(text: str) -> object:
    try:
        return parse_fault(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


async def serve(options: Options) -> int:
    """Run the stand-in; returns the exit status."""
    stand_in = StandIn(options)
    running = asyncio.create_task(stand_in.run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, running.cancel)
    try:
        status = await running
        print("the agent broke the protocol", file=sys.stderr, flush=True)
        stand_in.record.close()
        return status  # at once and without drain, as the real one
    except asyncio.CancelledError:
        await stand_in.drain()
        return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(serve(parse(sys.argv[1:]))))
