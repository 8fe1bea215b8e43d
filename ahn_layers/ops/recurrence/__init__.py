"""The recurrences of compressors over many tokens: chunked forms, kernels, and the choice between them."""
