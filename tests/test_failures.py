"""What libraries say of failures is told in words, and a rank ends after an error whatever it waits for."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mixcpt.errors import ConfigError, LostRankError, StoppedError
from megatron_mixcpt.runtime.failures import named
from megatron_mixcpt.runtime.leaving import exit_code
from tests.helpers.ports import free_port

ROOT = Path(__file__).parents[1]
# As torch has them, shortened.
PEERS = [
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:21374",
    "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error, NCCL version 2.28\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.\n"
    "Last error:\nsocketProgress: Connection closed by remote peer node2<41334>",
    "NCCL error in: ProcessGroupNCCL.cpp:94, internal error - please report this issue, NCCL version 2.27.3\n"
    "ncclInternalError: Internal check failed.",
    "NCCL communicator was aborted on rank 3.",
    "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12, OpType=ALLREDUCE, NumelIn=1, "
    "NumelOut=1, Timeout(ms)=60000) ran for 60072 milliseconds before timing out.",
    "wait timeout after 600000ms, keys: /default_pg/0//device-verdict",
]
DEVICES = [
    "CUDA error: uncorrectable ECC error encountered\n"
    "CUDA kernel errors might be asynchronously reported at some other API call.",
    "CUDA error: an illegal memory access was encountered",
    "NCCL error in: ProcessGroupNCCL.cpp:2091, unhandled cuda error (run with NCCL_DEBUG=INFO for details)\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`",
]
OURS = [
    "NCCL error in: NCCLUtils.cpp:94, invalid usage (run with NCCL_DEBUG=WARN for details)\n"
    "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.",
    "CUDA out of memory. Tried to allocate 2.00 GiB.",
    "CUDA error: out of memory",
    "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
]


@pytest.mark.parametrize("text", PEERS)
def test_a_lost_peer_is_named_over_gloo_and_nccl(text):
    error = named(RuntimeError(text))
    assert isinstance(error, LostRankError) and str(error).startswith("lost contact with another rank (")
    assert "\n" not in str(error) and "resume" in str(error)


@pytest.mark.parametrize("text", DEVICES)
def test_a_failed_device_is_named_with_its_place(text, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "5")
    error = named(RuntimeError(text))
    assert not isinstance(error, LostRankError) and f"the GPU of {os.uname().nodename} with local rank 5" in str(error)


@pytest.mark.parametrize("text", OURS)
def test_what_is_a_mistake_of_the_program_keeps_its_traceback(text):
    assert named(RuntimeError(text)) is None
    assert named(ValueError(PEERS[0])) is None
    known = ConfigError("a key")
    assert named(known) is known


def test_exit_codes_of_errors():
    errors = [ConfigError("x"), StoppedError("x"), LostRankError("x"), KeyboardInterrupt(), RuntimeError("x")]
    assert [exit_code(error) for error in errors] == [2, 75, 1, 130, 1]


# A rank of one whose group hangs like one of NCCL: while it is taken down, or when the process is over.
STUCK = """
import ctypes, sys, time
import torch.distributed
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.runtime import leaving
from megatron_mixcpt.runtime.parallel import parallel_context
leaving.CAN_HANG, leaving.GRACE_SECONDS = ("gloo",), 1.0
if sys.argv[1] == "down":
    torch.distributed.destroy_process_group = lambda: ctypes.CDLL(None).pause()
else:
    libc = ctypes.CDLL(None)
    getattr(libc, "__cxa_atexit")(libc.pause, None, None)  # after the interpreter
errors = {"known": ConfigError("train.lr: is wrong"), "bug": ZeroDivisionError("a bug")}
try:
    with parallel_context():
        raise errors[sys.argv[2]]
except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(
    ("where", "error", "code", "said"),
    [
        ("down", "known", 2, "rank 0: error: train.lr: is wrong\n(ended hard"),
        ("down", "bug", 1, "ZeroDivisionError: a bug"),
        ("exit", "known", -14, "error: train.lr: is wrong\n"),
    ],
)
def test_a_rank_ends_with_its_error_printed_although_its_groups_are_stuck(where, error, code, said):
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STUCK, where, error],
        env=os.environ | launched | {"MASTER_PORT": str(free_port()), "MIXCPT_DEVICE": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert said in done.stderr


def test_a_stop_while_a_library_reads_is_no_fault_of_the_file(tmp_path, monkeypatch):
    import transformers

    from megatron_mixcpt.huggingface.config import load_config
    from megatron_mixcpt.huggingface.tokenizers import extended_vocab_size
    from megatron_mixcpt.runtime.stop import StopRequest

    def stopped(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)

    (tmp_path / "config.json").write_text("{}")
    for library in (transformers.AutoConfig, transformers.AutoTokenizer):
        monkeypatch.setattr(library, "from_pretrained", stopped)
    with pytest.raises(StoppedError), StopRequest():
        load_config(tmp_path)
    with pytest.raises(StoppedError), StopRequest():
        extended_vocab_size(tmp_path, tmp_path, 10)
