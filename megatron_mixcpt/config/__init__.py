"""Configuration: what a training run's holds (schema.py), and how every command's file is read (reader.py)."""

from megatron_mixcpt.config.method import AdapterConfig, AlignSettings, ForgetConfig, LossConfig, TeacherConfig
from megatron_mixcpt.config.reader import load_config, rendered, save_config, validate
from megatron_mixcpt.config.schema import Config
from megatron_mixcpt.config.section import NonNegative, Positive, Section, Weight
from megatron_mixcpt.config.sections import (
    DataConfig,
    LayoutConfig,
    ModelConfig,
    OptimizerSection,
    ProfileConfig,
    TrainConfig,
    WandbConfig,
)

__all__ = [
    "AdapterConfig",
    "AlignSettings",
    "Config",
    "DataConfig",
    "ForgetConfig",
    "LayoutConfig",
    "LossConfig",
    "ModelConfig",
    "NonNegative",
    "OptimizerSection",
    "Positive",
    "ProfileConfig",
    "Section",
    "TeacherConfig",
    "TrainConfig",
    "WandbConfig",
    "Weight",
    "load_config",
    "rendered",
    "save_config",
    "validate",
]
