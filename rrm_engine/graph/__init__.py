"""The recursive policy, without I/O: `machine` decides; `types` are its inputs and its answers."""
