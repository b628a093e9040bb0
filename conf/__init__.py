"""Hydra configuration files. This file lets ``pkg://kvarena.conf`` work in editable installs."""
