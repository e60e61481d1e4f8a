"""Parts of the overhead benchmark."""
