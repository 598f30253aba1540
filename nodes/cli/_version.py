"""The version of Penstock; the one place that it is written in."""

VERSION = "0.1.0"
