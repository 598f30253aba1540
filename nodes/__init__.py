"""What is done: operators, sources and sinks, the runtime that feeds them, the supervisor that places them.

The top storey. It talks MQTT only through :mod:`broker`.
"""
