"""`mixcpt plan CONFIG [--nproc N] [key=value ...]`."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mixcpt.commands.options import count, positive, share

if TYPE_CHECKING:
    from megatron_mixcpt.architecture.architecture import Architecture
    from megatron_mixcpt.config import Config
    from megatron_mixcpt.data.mix import Mix
    from megatron_mixcpt.plan.estimate import RunPlan

NAME = "plan"
HELP = """What a configuration would take, without starting it: parameters, memory of a rank by part, tokens, hours, and
what is saved where. Checks the configuration as `mixcpt train`, `mixcpt align` or `mixcpt recall` would. Before there
is a model or data: `mixcpt plan train.yaml --nproc 8 --model-shape llama3-8b --tokens 2e9 --gpu h100-80g`"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="the YAML file that `mixcpt train`, `mixcpt align` or `mixcpt recall` takes")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="settings laid over the file's")
    parser.add_argument("--nproc", type=count, metavar="N", help="number of ranks (default: one model replica)")
    parser.add_argument("--mfu", type=share, default=0.4, help="share of the peak that is reached (default 0.4)")
    parser.add_argument(
        "--gpu",
        help="device whose bf16 peak counts: A100, H100 (default), H200, B200; with its memory, as a100-40g, "
        "also whether the run fits",
    )
    parser.add_argument("--memory", type=positive, metavar="GIB", help="of a rank's device: says whether the run fits")
    parser.add_argument("--peak-tflops", type=positive, metavar="T", help="peak of another device, in TFLOP/s a rank")
    parser.add_argument(
        "--model-shape",
        metavar="NAME",
        help="plan with the dimensions of a published model, as llama3-8b, or of a config.json: no weights are needed",
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help="plan with so many tokens of text, as 2e9: no data is needed",
    )


def run(args: argparse.Namespace) -> int:
    from megatron_mixcpt.config import Config, load_config
    from megatron_mixcpt.config.reader import read_document, validate_document
    from megatron_mixcpt.errors import ConfigError

    document = read_document(args.config, args.overrides)
    if "n" in document.values:  # which of all configurations `mixcpt recall`'s has alone
        from megatron_mixcpt.recall.config import RecallConfig
        from megatron_mixcpt.recall.cost import described

        for option in ("peak_tflops", "model_shape", "tokens"):
            if getattr(args, option) is not None:
                raise ConfigError(f"--{option.replace('_', '-')} is not for a file of `mixcpt recall`")
        recall = validate_document(RecallConfig, document)
        print("\n".join(described(recall, args.nproc or 1, args.gpu, args.memory, args.mfu)))
        return 0
    config = load_config(Config, args.config, args.overrides)
    from megatron_mixcpt.adapters.layout import describe_adapter
    from megatron_mixcpt.architecture.throughput import PEAK_BF16
    from megatron_mixcpt.data_prep.explain import explain_passes
    from megatron_mixcpt.plan.documents import document_lengths
    from megatron_mixcpt.plan.estimate import kept_checkpoints, make_plan
    from megatron_mixcpt.plan.fitting import device, verdict
    from megatron_mixcpt.plan.work import work_of
    from megatron_mixcpt.train.setup import existing_parent
    from megatron_mixcpt.train.validation_count import num_validations, validated_sequences

    grid, train = config.parallel, config.train
    world_size = args.nproc or grid.fewest
    gpu, memory = device(args.gpu or "H100")
    arch, mix = _model_and_mix(config, world_size, args)
    if args.gpu is not None and train.dtype == "fp32" and not args.peak_tflops:
        raise ConfigError(f"--gpu {args.gpu}: its bf16 peak is known, but train.dtype is fp32; give --peak-tflops")
    row_length = config.row_sequences * mix.seq_length
    on_gpu = bool(args.gpu or args.memory) or train.dtype == "bf16"
    plan = make_plan(config, arch, mix, world_size, gpu=on_gpu)

    print(f"model       {arch.describe_parameters()}, {arch.num_layers} layers, {train.dtype}")
    if config.adapter is not None:
        print(f"adapter     {describe_adapter(arch, config.adapter)}")
    print(
        f"grid        {world_size} rank{'s' * (world_size > 1)} = tensor {grid.tensor} x pipeline {grid.pipeline} "
        + f"x context {grid.context} " * (grid.context > 1)
        + f"x data {plan.data_size}"
        + f" with experts over {grid.expert} of them" * (grid.expert > 1)
        + "; "
        f"{plan.num_micro_batches} micro-batches of {train.micro_batch_size} x {row_length} tokens a step"
    )
    if grid.pipeline > 1:
        for line in _pipeline_lines(config, plan, arch.num_layers):
            print(line)
    header = ("weights", "gradients", "optimizer", "teacher", "activations", "logits", "total")
    where = "on a GPU" if on_gpu else "on a CPU, as fp32 and no --gpu say"
    print(f"memory of a rank {where}, GiB\n{'stage':8}{'parameters':>14}" + "".join(f"{name:>13}" for name in header))
    for index, stage in enumerate(plan.stages):
        cells = "".join(f"{getattr(stage, name) / 2**30:13.3f}" for name in header)
        print(f"{index:<8}{stage.num_parameters:14}{cells}")
    if config.optimizer.offload == "cpu":
        saved = max(stage.offloaded for stage in plan.stages) / 2**30
        print(f"            and {saved:.3f} GiB of host memory, where optimizer.offload keeps its state and gradients")
    if config.checkpoint.background:
        print(f"            and {max(s.snapshot for s in plan.stages) / 2**30:.3f} GiB of host memory while saving")
    print("            beside it the libraries: about 0.5 GiB a process, and on a GPU its context")
    if args.memory or args.gpu:
        first, *more = verdict(
            config, arch, mix, world_size, args.memory or memory, lambda other: _check(other, arch, mix, world_size)
        )
        print("\n".join([f"room        {first}", *(f"            {line}" for line in more)]))

    tokens = plan.tokens(train.steps)
    # Of unprepared text each row is one document, an upper bound.
    work = work_of(config, arch, document_lengths(mix) if args.tokens is None else {mix.seq_length: 1.0})
    print(f"data        {plan.tokens_per_step} tokens a step, {train.steps} steps = {tokens / 1e6:.1f} M tokens")
    for line in explain_passes(mix, train.steps, train.global_batch_size):
        print(f"            {line}")
    count, held_out = num_validations(config), validated_sequences(config, mix)
    if held_out:
        share = count * held_out * row_length * work.forward / (tokens * work.model)
        print(
            f"validation  {count} times {held_out} held-out sequences of {row_length} tokens, which adds "
            f"{share:.1%} to the work"
        )
    print(
        f"work        {work.model / 1e9:.4g} GFLOP a token for the model (what MFU counts), {work.executed / 1e9:.4g} "
        "executed with recomputation, padding and attention without a causal saving"
        + ("" if work.counts_teacher else "; without the teacher, whose family is not known: give it time of its own")
    )
    if train.dtype == "fp32" and not args.peak_tflops:
        print(f"time        {tokens * work.model:.3g} FLOP in fp32; --peak-tflops T of a rank's device gives hours")
    else:
        named = f"{args.peak_tflops:g} TFLOP/s" if args.peak_tflops else gpu
        peak = args.peak_tflops * 1e12 if args.peak_tflops else PEAK_BF16[gpu]
        hours = work.hours(tokens, world_size, peak, args.mfu)
        print(f"time        {hours:.2f} h at {args.mfu:.0%} of {world_size} x {named}, without validation and saving")

    kept = kept_checkpoints(config)
    free, needed = shutil.disk_usage(existing_parent(Path(config.run_dir))).free, (kept + 1) * plan.checkpoint
    print(
        f"disk        {config.run_dir}/checkpoints: {plan.checkpoint / 2**30:.3f} GiB each, up to {kept} kept and one "
        f"being written = {needed / 2**30:.3f} GiB; {free / 2**30:.1f} GiB are free here"
        + (": too little" if free < needed else "")
    )
    return 0


def _pipeline_lines(config: Config, plan: RunPlan, num_layers: int) -> list[str]:
    """How the layers lie, and what part of a step the pipeline's bubble is, with this and other interleaving."""
    from megatron_mixcpt.plan.schedule import idle_share

    grid, count = config.parallel, plan.num_micro_batches
    rows = [", ".join(map(str, map(len, plan.cut.parts_of(rank)))) for rank in range(grid.pipeline)]
    lines = [f"pipeline    layers of each stage: {' | '.join(rows)}"]
    choices = [v for v in (1, 2, 3, 4) if v * grid.pipeline <= num_layers] if count % grid.pipeline == 0 else [1]
    shares = [f"{idle_share(grid.pipeline, v, count):.1%} with {v}" for v in sorted({*choices, grid.interleave})]
    bubble = idle_share(grid.pipeline, grid.interleave, count)
    lines.append(f"            bubble: {bubble:.1%} of a step; by parallel.interleave: {', '.join(shares)}")
    return lines


def _model_and_mix(config: Config, world_size: int, args: argparse.Namespace) -> tuple[Architecture, Mix]:
    """What is there, or what is assumed in its place. Raises ConfigError where it does not fit together."""
    from megatron_mixcpt.objectives.build import read_training_mix
    from megatron_mixcpt.plan.assumed import assumed_mix, assumed_shape
    from megatron_mixcpt.train.setup import check_settings, read_architecture

    if args.model_shape is None and args.tokens is None:
        return check_settings(config, world_size)
    shape = assumed_shape(args.model_shape) if args.model_shape else None
    if args.tokens is None:
        mix = read_training_mix(config)
    else:
        mix = assumed_mix(config, args.tokens, shape.vocab_size if shape else None)
    arch = shape or read_architecture(config, mix)
    _check(config, arch, mix, world_size)
    return arch, mix


def _check(config: Config, arch: Architecture, mix: Mix, world_size: int) -> None:
    """Raise ConfigError where a run would refuse how model, data, grid and batch go together."""
    from megatron_mixcpt.train.setup import check_batch, check_rows, checked_model

    checked_model(config, arch, mix)
    check_rows(config, mix, world_size)
    check_batch(config, world_size)
