"""Heads of trained policies, made by a command of its own."""
