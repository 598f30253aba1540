"""The table of commands. Each is a module with a function ``command``, imported only when it is called.

Adding one is a file and a line here: the help of ``penstock`` itself is made from this table alone.
"""

from __future__ import annotations

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("nodes.cli.demo", "Run the demo: from camera frames to rows in a database, on this machine."),
    "new": ("nodes.cli.new", "Write a starter topology."),
    "check": ("nodes.cli.check", "Find everything that can be known to be wrong before running."),
    "graph": ("nodes.cli.graph", "Draw a topology, as Mermaid text or as an SVG picture."),
    "run": ("nodes.cli.run", "Run a topology, or the nodes of one host."),
    "drill": ("nodes.cli.drill", "Break a topology on purpose, and find out whether it keeps its promises."),
    "fl": ("nodes.cli.fl", "Federated jobs: status, rounds, clients, curves; simulate one with a thousand clients."),
    "model": ("nodes.cli.model", "Look at models: what they take, and how right they are on known examples."),
    "tap": ("nodes.cli.tap", "Show what travels on a topic, decoded, live."),
    "ledger": ("nodes.cli.ledger", "Print the books of a running topology: what came, what left, what is under way."),
    "dead": ("nodes.cli.dead", "List, show and replay the messages that nodes refused."),
    "nodes": ("nodes.cli.nodes", "List the kinds of nodes, sources, steps, models and sinks, and their options."),
    "schema": ("nodes.cli.schema", "Print the JSON Schema of a topology or of the messages on the wire."),
    "bench": ("nodes.cli.bench", "Measure Penstock on this machine, beside its peers; in a checkout."),
    "broker": ("nodes.cli.broker", "Run the embedded MQTT broker by itself."),
    "version": ("nodes.cli.version", "Print the versions of Penstock and of what it runs on."),
}
"""Name → (module, help in one line)."""
