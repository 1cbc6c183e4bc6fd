"""The student itself with its adapters switched off: the base model, at no extra memory."""

from __future__ import annotations

from contextlib import AbstractContextManager

from megatron_mixcpt.adapters.layers import adapters_off
from megatron_mixcpt.teacher.initial import ModelTeacher


class AdapterOffTeacher(ModelTeacher):
    """Where fresh adapters are trained, bit for bit the answer of `InitialTeacher`."""

    def as_teacher(self) -> AbstractContextManager[None]:
        return adapters_off(self.model)
