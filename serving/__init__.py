"""The process that answers: vLLM's own OpenAI server, with recording and hot swap."""
