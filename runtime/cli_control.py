"""The commands to a run that goes on: `status`, `scale`, `pause`, `continue`, `drain`, `stop`. Hooked in by `cli`.

Exit codes: 0 done; 1 the run does not answer, has ended, or refuses; 2 what was written is wrong (a name, an option, a
key file, a pool that the run does not have); 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from asyncrl.runtime import control_wire as wire
    from asyncrl.runtime.control_target import Target
    from asyncrl.runtime.facts import Concurrency

_ADDRESS = re.compile(r"tcp://(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):([0-9]{1,5})")
_TEXTS = {
    "status": (
        "show how a run stands: who waits for whom, pools, engines",
        "Shows how a run stands, who waits for whom first.",
    ),
    "scale": (
        "change a run's concurrency or a pool's engines",
        "Changes a run while it goes on. Concurrency is slots per engine, of every pool or of --pool; more takes "
        "effect at once, with less the newest partial rollouts are handed back and go on later. New engines start, "
        "join with the present weights and work; those too many hand their rollouts back and end.",
    ),
    "pause": (
        "hold a run still",
        "Engines hand their partial rollouts back and hold still; the learner trains what is ready. Nothing is lost.",
    ),
    "continue": (
        "go on after a pause or a drain",
        "Undoes `pause` and `drain`: engines take rollouts again.",
    ),
    "drain": (
        "let a pool, or the run, finish what it has",
        "With --pool: that pool's engines hand their rollouts back, stay up and take nothing more, until `continue` "
        "or `scale --pool`. Without: no new prompts are admitted, what is under way is finished and trained as far "
        "as whole batches go, and then the run ends in order.",
    ),
    "stop": (
        "end a run in order, as Ctrl-C",
        "As Ctrl-C: partial rollouts are handed back, the model is saved, the summary is written.",
    ),
}


def add_control(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    made = {name: _command(commands, name) for name in _TEXTS}
    made["status"].add_argument(
        "--watch", action="store_true", help="refresh every second, until Ctrl-C or the run's end"
    )
    made["status"].add_argument(
        "--json", action="store_true", dest="as_json", help="one JSON object; with --watch one a line"
    )
    for name in ("scale", "drain"):
        made[name].add_argument("--pool", metavar="NAME", help="of this pool alone")
    made["scale"].add_argument(
        "--concurrency", type=_concurrency, metavar="N|auto", help="slots per engine, from 1 on"
    )
    made["scale"].add_argument(
        "--engines",
        type=_engines,
        metavar="N",
        help="engines of the pool; needs --pool where there are several",
    )


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str
) -> argparse.ArgumentParser:
    text, description = _TEXTS[name]
    command = commands.add_parser(name, help=text, description=description)
    command.add_argument("name", metavar="RUN", nargs="?", help="a run's folder, or its name under runs/")
    elsewhere = command.add_argument_group("from another machine, instead of RUN")
    elsewhere.add_argument(
        "--address",
        type=_address,
        metavar="tcp://HOST:PORT",
        help="the run's machine, with the port that `status` shows there",
    )
    elsewhere.add_argument("--key", type=Path, metavar="FILE", help="a copy of the run's keys/client.key")
    command.set_defaults(run=_carry_out, command=name)
    return command


def _concurrency(text: str) -> Concurrency:
    if text == "auto":
        return "auto"
    if not text.isdecimal() or not 1 <= int(text) <= 65536:
        raise argparse.ArgumentTypeError(
            f'expected a number of slots from 1 to 65536, or auto, got "{text}"; `pause` and `drain` hold engines still'
        )
    return int(text)


def _engines(text: str) -> int:
    if not text.isdecimal() or int(text) > 65536:
        raise argparse.ArgumentTypeError(f'expected a number of engines from 0 to 65536, got "{text}"')
    return int(text)


def _address(text: str) -> str:
    found = _ADDRESS.fullmatch(text)
    if not found or not 1 <= int(found[2]) <= 65535:
        raise argparse.ArgumentTypeError(f'expected such as tcp://10.0.0.5:61234, got "{text}"')
    return text


def _carry_out(chosen: argparse.Namespace) -> int:
    from asyncrl.runtime.control import CommandRefused, WrongCommand
    from asyncrl.runtime.control_client import ControlClient, ControlFault
    from asyncrl.runtime.control_target import Unreached, why
    from asyncrl.runtime.status_watch import show, watch

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="replace"
        )  # what a run says may have signs that this terminal cannot show
    # A pipe has no width of its own, and tables cut to 80 columns say little.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160
    out, target = Console(width=width), None
    try:
        target, request = _target(chosen), _request(chosen)
        with ControlClient(target.endpoint, target.keys) as client:
            if chosen.command == "status":
                if chosen.watch:
                    return watch(target, client, out, as_json=chosen.as_json)
                return show(client, out, as_json=chosen.as_json)
            out.print(client.told(request), highlight=False, markup=False, soft_wrap=True)
            return 0
    except Unreached as problem:
        return _say(str(problem), problem.exit_code)
    except CommandRefused as refusal:
        return _say(f"{chosen.command}: {refusal}", 2 if isinstance(refusal, WrongCommand) else 1)
    except ControlFault as fault:
        return _say(str(fault) if target is None else why(target, fault), 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read it has seen enough; the interpreter's own flush at the end must not meet the pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _target(chosen: argparse.Namespace) -> Target:
    """Where to ask, from a run's folder or from address and key. Raises Unreached."""
    from asyncrl.runtime.control_target import Unreached, target_at, target_run

    if chosen.name is not None and chosen.address is None and chosen.key is None:
        return target_run(chosen.name)
    if chosen.name is None and chosen.address is not None and chosen.key is not None:
        return target_at(chosen.address, chosen.key)
    given = [n for n in ("name", "address", "key") if getattr(chosen, n) is not None]
    got = " and ".join({"name": "RUN", "address": "--address", "key": "--key"}[n] for n in given)
    raise Unreached(
        f"{chosen.command}: expected either RUN, or --address and --key; got {got or 'none of them'}", 2
    )


def _request(chosen: argparse.Namespace) -> wire.Request:
    """Raises WrongCommand."""
    from asyncrl.runtime import control_wire as wire
    from asyncrl.runtime.control import WrongCommand

    match chosen.command:
        case "status":
            return wire.AskStatus()
        case "scale":
            if chosen.concurrency is None and chosen.engines is None:
                raise WrongCommand("expected --concurrency N, --concurrency auto or --engines N")
            return wire.Scale(pool=chosen.pool, concurrency=chosen.concurrency, engines=chosen.engines)
        case "drain":
            return wire.Drain(pool=chosen.pool)
        case "pause":
            return wire.Pause()
        case "continue":
            return wire.GoOn()
        case _:
            return wire.Stop()


def _say(text: str, code: int) -> int:
    Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)
    return code
