"""The recursive policy, without I/O: `machine` decides, `types` is what it is told and what it answers."""
