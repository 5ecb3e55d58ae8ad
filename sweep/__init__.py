"""What a user drives: configuration, grid, launch, queries, statistics, frontiers, report."""
