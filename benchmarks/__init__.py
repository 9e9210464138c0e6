"""What is timed, against whom, and the report."""
