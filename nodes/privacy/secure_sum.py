"""Secure aggregation: the coordinator learns the sum of the clients' numbers, and nothing else of any of them.

After Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017 (two masks on every
vector), and Bell et al., "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS 2020 (a client talks to some
neighbours only). docs/federated-privacy.md says what is promised against whom.

Every client adds to its numbers, modulo 2³², a mask of its own and one for each neighbour, which the neighbour subtracts. The
secrets behind them are shared among the neighbours. Of a client whose numbers arrived, they give back its own mask; of one that
dropped out, the key of its masks with others; never both. Both parties do no I/O; whoever carries them calls:

=========  ====================================  ==========================================
phase      client                                coordinator
=========  ====================================  ==========================================
keys       ``keys()``                            ``key(payload)`` each; ``roster()``
shares     ``share(roster)``                     ``share(payload)`` each; ``inboxes()``
masked     ``mask(inbox, values, samples)``      ``masked(client, vector)``; ``survivors()``
(agree)    ``agree(survivors)``                  ``agree(payload)`` each; ``agreements()``
unmask     ``reveal(survivors, agreements)``     ``reveal(payload)`` each; ``total()``
=========  ====================================  ==========================================

The phase in brackets is there only where the terms say ``agreed``. Commit ``snapshot()`` before sending what a call answered: the
same question is then answered the same after a crash, and another one in its place is refused. After the last phase of a round
throw the snapshot away.
"""

from __future__ import annotations

from nodes.privacy.secure_client import Client
from nodes.privacy.secure_server import Server
from nodes.privacy.secure_terms import SecureSumError, Terms, degree_for

__all__ = ["Client", "SecureSumError", "Server", "Terms", "degree_for"]
