"""Units of measurement: what one is in its quantity's base unit. Exact factors (SI brochure, NIST SP 811) where defined."""

from __future__ import annotations

from dataclasses import dataclass

from schemas.errors import did_you_mean


@dataclass(frozen=True, slots=True)
class Unit:
    """base value = value × factor + shift, in the base unit of ``quantity``."""

    quantity: str
    factor: float
    shift: float = 0.0


_LB, _FT, _G = 0.45359237, 0.3048, 9.80665
_LINEAR: dict[str, dict[str, float]] = {
    "pressure": {
        "Pa": 1, "hPa": 1e2, "kPa": 1e3, "MPa": 1e6, "mbar": 1e2, "bar": 1e5, "atm": 101325, "Torr": 101325 / 760,
        "mmHg": 133.322387415, "psi": _LB * _G / 0.0254**2, "inHg": 3386.389,
    },
    "length": {
        "m": 1, "km": 1e3, "dm": 0.1, "cm": 1e-2, "mm": 1e-3, "µm": 1e-6, "um": 1e-6, "nm": 1e-9, "in": 0.0254, "ft": _FT,
        "yd": 0.9144, "mi": 1609.344, "nmi": 1852,
    },
    "area": {"m2": 1, "cm2": 1e-4, "mm2": 1e-6, "km2": 1e6, "ha": 1e4, "ft2": _FT**2, "in2": 0.0254**2},
    "volume": {
        "m3": 1, "l": 1e-3, "L": 1e-3, "dl": 1e-4, "cl": 1e-5, "ml": 1e-6, "cm3": 1e-6, "gal": 3.785411784e-3, "ft3": _FT**3,
    },
    "flow": {"m3/s": 1, "m3/h": 1 / 3600, "l/s": 1e-3, "l/min": 1e-3 / 60, "l/h": 1e-3 / 3600, "gpm": 3.785411784e-3 / 60},
    "speed": {"m/s": 1, "km/h": 1 / 3.6, "mm/s": 1e-3, "mph": 0.44704, "kn": 1852 / 3600, "ft/s": _FT},
    "acceleration": {"m/s2": 1, "g0": _G, "mg0": _G * 1e-3},
    "mass": {"kg": 1, "g": 1e-3, "mg": 1e-6, "µg": 1e-9, "t": 1e3, "lb": _LB, "oz": _LB / 16},
    "force": {"N": 1, "kN": 1e3, "lbf": _LB * _G},
    "torque": {"Nm": 1, "lbft": _LB * _G * _FT},
    "time": {"s": 1, "ms": 1e-3, "µs": 1e-6, "us": 1e-6, "ns": 1e-9, "min": 60, "h": 3600, "d": 86400},
    "frequency": {"Hz": 1, "kHz": 1e3, "MHz": 1e6, "GHz": 1e9, "rpm": 1 / 60},
    "energy": {
        "J": 1, "kJ": 1e3, "MJ": 1e6, "Wh": 3600, "kWh": 3.6e6, "MWh": 3.6e9, "cal": 4.184, "kcal": 4184, "BTU": 1055.05585262,
    },
    "power": {"W": 1, "mW": 1e-3, "kW": 1e3, "MW": 1e6, "hp": 745.6998715822702},
    "voltage": {"V": 1, "mV": 1e-3, "µV": 1e-6, "kV": 1e3},
    "current": {"A": 1, "mA": 1e-3, "µA": 1e-6},
    "resistance": {"Ω": 1, "ohm": 1, "kΩ": 1e3, "kohm": 1e3, "MΩ": 1e6},
    "angle": {"rad": 1, "°": 0.017453292519943295, "deg": 0.017453292519943295, "turn": 6.283185307179586},
    "ratio": {"1": 1, "%": 1e-2, "‰": 1e-3, "ppm": 1e-6, "ppb": 1e-9},
}  # fmt: skip
UNITS: dict[str, Unit] = {
    name: Unit(quantity, factor) for quantity, table in _LINEAR.items() for name, factor in table.items()
} | {
    "K": Unit("temperature", 1.0),
    "°C": Unit("temperature", 1.0, 273.15),
    "°F": Unit("temperature", 5 / 9, 459.67 * 5 / 9),
    "degC": Unit("temperature", 1.0, 273.15),
    "degF": Unit("temperature", 5 / 9, 459.67 * 5 / 9),
}


def unit(name: str) -> Unit:
    """The unit of this name.

    :raises ValueError: it is not known.
    """
    if found := UNITS.get(name.strip().replace("²", "2").replace("³", "3")):
        return found
    hint = did_you_mean({"C": "°C", "F": "°F", "c": "°C", "f": "°F"}.get(name, name), UNITS)
    raise ValueError(f"unknown unit {name.strip()!r}{hint}")


def conversion(start: str, end: str) -> tuple[float, float]:
    """(factor, shift): value in ``end`` = value in ``start`` × factor + shift.

    :raises ValueError: a unit is not known, or the two measure different things.
    """
    a, b = unit(start), unit(end)
    if a.quantity != b.quantity:
        raise ValueError(f"{start!r} is a {a.quantity} and {end!r} a {b.quantity}")
    return a.factor / b.factor, (a.shift - b.shift) / b.factor
