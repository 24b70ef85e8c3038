"""From settings to finished runs: configuration, assembly, run folders, comparisons."""
