"""The plugins that come with sdg: each one a module that a user may copy as a start for their own."""
