"""One script per data set, over two shared modules: tokenizer and shards."""
