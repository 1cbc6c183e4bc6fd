"""Wrong arguments are refused with a message that names the argument."""

import pytest
import torch

from megatron_mixcpt.kernels import lssd_loss, lssd_loss_reference

STUDENT, TEACHER, LABELS = torch.randn(4, 10), torch.randn(4, 10), torch.arange(4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student": STUDENT.double()}, TypeError, "student is torch.float64"),
        ({"teacher": TEACHER.int()}, TypeError, "teacher is torch.int32"),
        ({"labels": LABELS.int()}, TypeError, "labels are torch.int32"),
        ({"labels": LABELS[:3]}, ValueError, r"student \[4, 10\] must have the dimensions of labels \[3\]"),
        ({"teacher": TEACHER[:2]}, ValueError, r"teacher \[2, 10\] must have the dimensions of labels"),
        ({"teacher": TEACHER[:, :9]}, ValueError, "pass valid_vocab"),
        ({"teacher": TEACHER[:, :5], "valid_vocab": 8}, ValueError, "fewer than the 8"),
        ({"target": "flip"}, ValueError, "target='flip': must be one of swap, plain, mft"),
        ({"temperature": 0.0}, ValueError, "temperature=0.0"),
        ({"temperature": float("nan")}, ValueError, "temperature=nan"),
        ({"margin": 0.0}, ValueError, "margin=0.0"),
        ({"margin": 1.5}, ValueError, "margin=1.5"),
        ({"vocab_start": -1}, ValueError, "vocab_start=-1"),
        ({"valid_vocab": 2**25}, ValueError, "valid_vocab=33554432"),
        ({"grad_buffer": "student"}, ValueError, "grad_buffer='student'"),
        ({"grad_buffer": "teacher", "teacher": None}, ValueError, "grad_buffer='teacher'"),
        ({"grad_buffer": "teacher", "teacher": TEACHER.bfloat16()}, ValueError, "dtype and shape"),
        ({"grad_buffer": "teacher", "teacher": TEACHER.clone().requires_grad_()}, ValueError, "no_grad"),
        ({"ce_weight": torch.ones(3)}, ValueError, r"ce_weight \[3\]"),
        ({"kd_weight": torch.ones(4, requires_grad=True)}, ValueError, "kd_weight requires a gradient"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else str(value),  # the same in every worker
)
def test_wrong_argument_is_named(changes, error, message):
    arguments = {"student": STUDENT, "teacher": TEACHER, "labels": LABELS} | changes
    for function in (lssd_loss, lssd_loss_reference):
        with pytest.raises(error, match=message):
            function(**arguments)


def test_unknown_implementation_is_refused(monkeypatch):
    monkeypatch.setenv("MIXCPT_LSSD", "cuda")
    with pytest.raises(ValueError, match="MIXCPT_LSSD='cuda'"):
        lssd_loss(STUDENT, TEACHER, LABELS)
