"""Measurements of Penstock against its limits and its peers; ``make bench`` runs them, tests never do."""
