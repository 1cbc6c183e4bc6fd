"""Where the distillation target comes from: see interface.py for what all teachers have in common."""

from megatron_mixcpt.teacher.initial import InitialTeacher, ModelTeacher
from megatron_mixcpt.teacher.interface import DenseTarget, HiddenTarget, Target, Teacher, TopkTarget

__all__ = ["DenseTarget", "HiddenTarget", "InitialTeacher", "ModelTeacher", "Target", "Teacher", "TopkTarget"]
