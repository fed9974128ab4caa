"""Stands in for numpy, which `datasets` brings along: Arrow would import it in each run, for an eighth of a second."""

raise ImportError("the runs of the tests do without numpy, as sdg does where nothing else has installed it")
