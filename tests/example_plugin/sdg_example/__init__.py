"""Plugins for `sdg`: a reader, a rollout, a resource, a writer and a server."""
