# Stands in for importlib._bootstrap_external: nothing is ever imported from disk, so there is no finder and no loader.
import sys


def _install(bootstrap):
    bootstrap._bootstrap_external = sys.modules[__name__]
