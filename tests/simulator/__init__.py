"""The simulator: the core's two state machines in a world of virtual time, bad networks and bad disks. See `world`."""
