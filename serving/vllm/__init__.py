"""What knows vLLM's insides: its app, executor, worker, sampler and model list."""
