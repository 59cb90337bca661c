"""Random C programs whose state a model knows, and edits of them: data across patches, held against the model."""
