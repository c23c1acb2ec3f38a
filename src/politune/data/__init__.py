"""Training data: where they come from (`sources`, `files`, `hub`), what a row means (`format`), sets made of others (`build`)."""
