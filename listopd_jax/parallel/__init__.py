"""The mesh, the rules of placement and many hosts: the only place that knows how many devices there are."""
