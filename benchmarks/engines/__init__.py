"""The other engines that benchmarks/peers.py measures."""
