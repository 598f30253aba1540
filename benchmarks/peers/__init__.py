"""What a user would take instead of Penstock, doing the benchmarks' work: one file each, every one runs by itself."""
