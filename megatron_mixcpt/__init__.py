"""Megatron-MixCPT: continual pre-training that makes a general LLM a domain expert without making it forget."""

__version__ = "0.2.0.dev0"
