"""`mixcpt certify-loss package.module:function [--formula F] [--nproc N]`."""

from __future__ import annotations

import argparse

NAME = "certify-loss"
HELP = """Hold a vocabulary-parallel cross-entropy or KL divergence of your own, or of any library, against dense
formulas in fp64: value and gradient on 1, 2 and 4 ranks. It is called as function(logits, labels, group), for the
divergences as function(student, teacher, group), with this rank's columns of the logits, and returns the loss of each
token or their mean. Exit code 3 where it is off. Example: mixcpt certify-loss package.losses:kl --formula forward-kl"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("loss", metavar="package.module:function")
    parser.add_argument(
        "--formula",
        choices=["cross-entropy", "forward-kl", "reverse-kl"],
        default="cross-entropy",
        help="what it should compute: cross-entropy (default), KL(teacher || student) or KL(student || teacher)",
    )
    parser.add_argument("--nproc", type=int, default=4, metavar="N", help="most ranks to try (default 4)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")


def run(args: argparse.Namespace) -> int:
    from megatron_mixcpt.certify.foreign import certify_loss
    from megatron_mixcpt.errors import VerificationError

    verdicts = certify_loss(args.loss, args.formula, args.nproc, args.device)
    for verdict in verdicts:
        print(f"{args.loss}: {verdict.told()}")
    if any(verdict.is_off for verdict in verdicts):
        raise VerificationError(f"{args.loss} is not {args.formula}")
    return 0
