"""The serving process: vLLM's own OpenAI server, with recording and hot swap."""
