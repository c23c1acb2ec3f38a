"""Data sets looked at before a run: measured (`scan`), judged (`audit`, `checks`), held against one another (`arms`)."""
