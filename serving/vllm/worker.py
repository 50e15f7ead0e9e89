"""Code that runs inside the vLLM worker: it installs the sampler and reloads weights.

``WorkerExtension`` is mixed into vLLM's worker class; its methods are called by name through
``engine.collective_rpc``. The module must stay cheap to import: the API process reads
``PROCESSED_ROW`` from it.
"""

from __future__ import annotations

import logging
import signal
import time
from pathlib import Path
from typing import Any

PROCESSED_ROW = "moorline_processed_logprobs"
"""Key in ``SamplingParams.extra_args``: this row's logprobs are for the recorder."""


class WorkerExtension:
    """Mixed into vLLM's worker; ``self`` is the worker. Names start with ``moorline_``."""

    model_runner: Any
    model_config: Any
    _moorline_prepared: Any = None
    """Base directory and changes, between the two calls of a reload."""

    def moorline_install(self) -> None:
        """Replace the sampler by one that picks the logprob convention row by row.

        Also: Ctrl-C in a terminal reaches the whole process group, and a worker that dies of it
        would cut the replies that the server is about to drain. The server stops its workers.
        """
        from serving.vllm.sampler import install

        install(self.model_runner)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def moorline_prepare(self, base_dir: str, adapter_dir: str | None) -> int:
        """Read and check an adapter while requests go on; None is the base model.

        Returns:
            How many weight matrices it changes.

        Raises:
            AdapterInvalid: nothing was changed.
        """
        from serving.vllm.merge import check_shapes, read_adapter

        changes = {} if adapter_dir is None else read_adapter(Path(adapter_dir))
        check_shapes(changes, Path(base_dir))
        self._moorline_prepared = (base_dir, changes)
        return len(changes)

    def moorline_load_prepared(self) -> float:
        """Load base + adapter in place. Only while generation is paused. Returns seconds.

        Raises:
            Exception: layers may be half loaded; the engine must not go on.
        """
        from serving.vllm.merge import merged_weights

        base_dir, changes = self._moorline_prepared
        self._moorline_prepared = None
        start = time.monotonic()
        reload_logger = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
        level = reload_logger.level
        reload_logger.setLevel(logging.ERROR)  # it warns about the tied head, repaired below
        try:
            self.model_runner.reload_weights(
                weights_iterator=merged_weights(Path(base_dir), changes, self.model_config.dtype)
            )
        finally:
            reload_logger.setLevel(level)
        self._moorline_repair_heads()
        return time.monotonic() - start

    def _moorline_repair_heads(self) -> None:
        """A tied head keeps a packed copy of the embeddings on CPU that a reload does not renew."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        for module in self.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)
