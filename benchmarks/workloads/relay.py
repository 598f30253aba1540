"""Topic in, °F for °C, topic out, over JSON: one message in and one message out, 500 under way, at QoS 0 and QoS 1.

*gathered*: the same, but a program may put what it has into one message: ``each: message`` of the ``mqtt`` sink, a list of
readings in the peers. All of it is a closed loop: the generator sends a reading for each that came back, so the rate is what
the path takes, and the rate of a contestant that loses one, or answers one twice, is 0. Values are compared too. *generator
alone* is the generator's and collector's own rate through the broker, with no program between them. At QoS 1 ours
acknowledges a reading when the broker has acknowledged its answer, the peers as soon as they have it.
"""

from __future__ import annotations

from benchmarks.contestants import PROGRAMS
from benchmarks.figures import OURS, Comparison, Figure, in_turns
from benchmarks.side import ALONE, EMBEDDED, MOSQUITTO, Load, compare, contestants

CLOSED = Load(window=500)
GATHERED = Load(window=4000)


def measure() -> list[Figure | Comparison]:
    """All figures of this file."""
    peers = [who for who in PROGRAMS if who != OURS]
    zero = contestants("relay", 0, CLOSED, MOSQUITTO, [OURS, *peers, ALONE])
    own = contestants("relay", 0, CLOSED, EMBEDDED, [OURS, "c", ALONE])
    seen = in_turns({**zero, **{f"{who} on ours": task for who, task in own.items()}})
    one = in_turns(contestants("relay", 1, CLOSED, MOSQUITTO, [OURS, *peers]))
    gathered = in_turns(contestants("gathered", 0, GATHERED, MOSQUITTO, [OURS, *peers]))
    at_mosquitto = {who: seen[who] for who in zero}
    programs = {who: seen[who] for who in zero if who != ALONE}
    at_ours = {OURS: seen[f"{OURS} on ours"]} | ({"c on mosquitto": seen["c"]} if "c" in seen else {})
    at_ours |= {f"{who} on ours": seen[f"{who} on ours"] for who in own if who != OURS}
    bars = {"c": 0.95, "aiomqtt": 3.0, "paho": 1.4, "node-red": 1.4}
    return [
        compare("relay, one to one, QoS 0", "messages/s", at_mosquitto, lambda it: it.rate, bars),
        compare("relay, one to one, QoS 1", "messages/s", one, lambda it: it.rate, bars),
        compare("relay, one to one, embedded broker", "messages/s", at_ours, lambda it: it.rate, {"c on mosquitto": 3}),
        compare("relay, one to one, QoS 0, CPU", "µs", programs, lambda it: it.cpu * 1e6, {}, at_most=True),
        compare("relay, gathered, QoS 0", "readings/s", gathered, lambda it: it.rate, {}),
        compare("relay, gathered, QoS 0, CPU", "µs", gathered, lambda it: it.cpu * 1e6, {}, at_most=True),
    ]
