"""The command ``kvarena``: the only folder that knows Hydra."""
