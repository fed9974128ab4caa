"""The plugins that come with sdg, a folder for each kind, and the machinery that they share; see README.md here."""

import sys


def script() -> None:
    """The console script `sdg`.

    It begins here, because another project's distribution is called `sdg`: a package of that name hides the module.
    """
    import sdg

    if not hasattr(sdg, "script"):
        where = list(getattr(sdg, "__path__", [])) or [getattr(sdg, "__file__", "sys.path")]
        sys.exit(
            f"sdg: another project's package `sdg`, in {where[0]}, hides the module of sdg-engine: run "
            "`pip uninstall sdg`, or install sdg-engine into an environment of its own"
        )
    sdg.script()
