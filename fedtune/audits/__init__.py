"""Audits: attacks on a finished run, each with its interval and a check that it was valid.

An attack that finds nothing proves nothing, so every finding names its adversary, says whether the
measurement could have succeeded, and stands beside what the run's ledger claims.
"""
