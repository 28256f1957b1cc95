"""What ``mrgen-synthesize`` does: cohorts from trained generators."""
