"""One command for each claim; records in results/, failures in LOG.md."""
