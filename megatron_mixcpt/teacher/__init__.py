"""Where teacher logits come from."""

from megatron_mixcpt.teacher.initial import InitialTeacher

__all__ = ["InitialTeacher"]
