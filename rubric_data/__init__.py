"""What was asked, answered and judged: records, files, judges, verifiers, embedded data. Never imports torch."""
