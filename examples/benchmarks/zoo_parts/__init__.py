"""Parts of the zoo benchmark: model suites, pruning backends, the judge, the worker process and the tables."""
