"""The experiments that this repository records; they may name policies."""
