"""Stands in for pandas, which `datasets` brings along: Arrow would import it in each run, for half a second."""

raise ImportError("the runs of the tests do without pandas, as most users' do")
