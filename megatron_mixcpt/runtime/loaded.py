"""Imported once, by the process from which ranks are forked (forked.py): the libraries of a rank that take long."""

import warnings

from megatron_mixcpt.quick_import import quicken

quicken()  # as the ranks themselves do: megatron-core has not been imported by anybody yet
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # as `silence_libraries`, of what they say while they load
    import megatron.core.datasets.gpt_dataset
    import megatron.core.dist_checkpointing.strategies.torch
    import megatron.core.models.gpt.gpt_model
    import megatron.core.optimizer  # noqa: F401
    import torch._dynamo  # noqa: F401 - which torch.optim imports at the first step
    import transformers  # noqa: F401
