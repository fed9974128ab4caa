"""Put the fitter of `fitting.py` into the chain of requests; apart from it, because only runs need its imports."""

from __future__ import annotations

import sdg


@sdg.hookimpl
def wrap_requests(run: sdg.Run, send: sdg.Send) -> sdg.Send:
    """Make documents fit the model's context."""
    from sdg_plugins.truncation.fitting import Fitter

    run.fitter = Fitter(run, send)
    return run.fitter.send
