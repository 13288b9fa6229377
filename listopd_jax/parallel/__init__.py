"""Many devices and many hosts: the only place that knows how many there are."""
