"""From a configuration to its certificate."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch

from megatron_mixcpt.certify.compare import Deviation
from megatron_mixcpt.certify.problem import SEQ_LENGTH, pose
from megatron_mixcpt.certify.report import KINDS, write_page
from megatron_mixcpt.certify.scope import refuse_what_cannot_be_certified, small_parts
from megatron_mixcpt.certify.trial import Outcome, on_this_machine, try_all
from megatron_mixcpt.config import Config
from megatron_mixcpt.convert.certificate import FILE_NAME, Certificate, current_versions, features_of, settings_of
from megatron_mixcpt.data.mix import open_mix
from megatron_mixcpt.errors import ConfigError, VerificationError
from megatron_mixcpt.rehearse.grid import data_parallel_size, fitting_grid
from megatron_mixcpt.rehearse.scale import expert_ranks, small_architecture
from megatron_mixcpt.runtime.devices import cuda_devices
from megatron_mixcpt.runtime.scratch import scratch_folder
from megatron_mixcpt.train.setup import check_settings

SHOWN = 3  # things of a kind that are off, in the terminal


def certify(config: Config, nproc: int | None, device: str | None, out: Path) -> int:
    """Certify a run of `nproc` ranks; returns an exit code.

    Args:
        nproc: as of rehearse.
        device: cpu or cuda; None takes CUDA where this machine has a device for each rank of the small grid.
        out: folder of certificate and page.

    Raises ConfigError for what `mixcpt train` would refuse and what cannot be certified, VerificationError where
    something is off.
    """
    began = time.monotonic()
    if nproc is not None and nproc < 1:
        raise ConfigError(f"--nproc {nproc}: give the ranks of the run, from 1")
    data_size = data_parallel_size(config, nproc)
    ranks = config.parallel.replica * data_size
    arch, mix = check_settings(config, nproc or ranks)
    refuse_what_cannot_be_certified(config)
    layout = config.parallel
    small = small_architecture(arch, layout.tensor, small_parts(config), SEQ_LENGTH)
    grid = fitting_grid(config, arch, data_size, small, dataclasses.replace(mix, seq_length=SEQ_LENGTH))
    expert = expert_ranks(config, grid)
    chosen = _device(device, grid.world_size)
    print(
        f"certify: tensor {grid.tensor} x pipeline {grid.pipeline} x context {grid.context} x data {grid.data} = "
        f"{grid.world_size} processes on {chosen}" + (f", experts over {expert} of them" if expert > 1 else ""),
        flush=True,
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / FILE_NAME).unlink(missing_ok=True)  # of settings that may be others now
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}: name another folder") from None
    with scratch_folder("mixcpt-certify-") as folder:
        problem = pose(config, arch, open_mix(config.data.mix), grid, data_size, folder / "problem")
        for line in problem.left_out:
            print(f"not part   {line}", flush=True)
        outcomes = try_all(problem, on_this_machine(chosen))
    certificate = Certificate(
        settings=settings_of(config),
        features=features_of(arch),
        ranks=ranks,
        grid=dataclasses.asdict(grid) | ({"expert": expert} if expert > 1 else {}),
        versions=current_versions(),
        device=_named(chosen),
        measured=_measured(outcomes),
        compared=sum(len(outcome.deviations) for outcome in outcomes),
        left_out=list(problem.left_out),
    )
    page = write_page(certificate, outcomes, out)
    if any(outcome.off for outcome in outcomes):
        raise VerificationError(_told(outcomes, page))
    path = certificate.write(out)
    print(
        f"certify: {certificate.compared} comparisons with the oracle are within their bounds, in "
        f"{time.monotonic() - began:.0f} s: {path}, {page.name}"
    )
    return 0


def _device(device: str | None, ranks: int) -> str:
    count = 0 if device == "cpu" else cuda_devices()
    if device == "cuda" and count < ranks:
        raise ConfigError(f"--device cuda: the grid takes {ranks} devices, this machine has {count}: use --device cpu")
    return device or ("cuda" if count >= ranks else "cpu")


def _named(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def _measured(outcomes: list[Outcome]) -> list[dict[str, object]]:
    """The worst of each kind of thing, by how much of its bound it takes."""
    rows: list[dict[str, object]] = []
    for outcome in outcomes:
        worst: dict[str, Deviation] = {}
        for deviation in outcome.deviations:
            before = worst.get(deviation.what)
            if before is None or deviation.share > before.share:
                worst[deviation.what] = deviation
        rows += [
            {"dtype": outcome.dtype, "what": what, "worst": of.name, "error": of.error, "bound": of.bound}
            for what, of in worst.items()
        ]
    return rows


def _told(outcomes: list[Outcome], page: Path) -> str:
    lines = []
    for outcome in outcomes:
        off = sorted(outcome.off, key=lambda deviation: -deviation.share)
        if off:
            lines.append(
                f"certify: in {outcome.dtype} {len(off)} of {len(outcome.deviations)} comparisons with the oracle are "
                f"off; {outcome.cause}"
            )
            kinds = [[deviation for deviation in off if deviation.what == kind][:SHOWN] for kind in KINDS]
            shown = [deviation for of in kinds for deviation in of]
            lines += [f"  {deviation.told()}" for deviation in shown]
            lines += [f"  and {len(off) - len(shown)} more"] * (len(off) > len(shown))
    return "\n".join([*lines, f"  all of it: {page}"])
