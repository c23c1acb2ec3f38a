"""Training data: where it comes from (`sources`, `files`, `hub`), what a row means (`format`), and sets made of others (`build`)."""
