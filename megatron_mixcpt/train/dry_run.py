"""One step on made-up data before the real data: what does not fit in memory shows in the first minute."""

from __future__ import annotations

import torch

from megatron_mixcpt.checkpoint.optimizer_state import allocate_state
from megatron_mixcpt.config import Config
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.runtime.failures import tell_alone
from megatron_mixcpt.runtime.parallel import ParallelState
from megatron_mixcpt.train.setup import Components


def dry_run(config: Config, components: Components, state: ParallelState) -> None:
    """Forward and backward over as many micro-batches as are in flight at once; leaves no trace in the model.

    Raises ConfigError, naming what to change, where memory runs out.
    """
    size = config.train.micro_batch_size
    # In the interleaved schedule the first parts of up to twice as many wait for their gradients.
    in_flight = state.pipeline_size * (2 if config.parallel.interleave > 1 else 1)
    count = min(config.train.global_batch_size // (size * state.data_size), in_flight)
    try:
        allocate_state(components.optimizer)
        components.model.zero_grad_buffer()
        components.run([components.task.fullest_batch(size) for _ in range(count)])
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        message = (
            f"rank {state.rank}: out of memory in a trial step with train.micro_batch_size={size} x "
            f"{components.task.row_length} tokens ({str(error).splitlines()[0][:120]}). `mixcpt plan` shows what takes "
            "how much; lower train.micro_batch_size, or set train.recompute=full, train.distributed_optimizer=true, or "
            "a larger parallel.tensor or parallel.pipeline"
        )
        raise tell_alone(ConfigError(message)) from None
    finally:
        components.model.zero_grad_buffer()
        components.optimizer.zero_grad()


def _is_out_of_memory(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in text or "not enough memory" in text
