"""Training stages: data, objectives and their loop."""
