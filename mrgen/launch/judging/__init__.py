"""What ``mrgen-evaluate`` does with runs: one module a protocol."""
