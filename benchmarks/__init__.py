"""Speed, always as a ratio measured side by side; see docs/performance.md."""
