"""`mixcpt mix`: another mixture of data that is already prepared, in seconds and without a copy."""

import argparse
from pathlib import Path

from megatron_mixcpt.errors import ConfigError

NAME = "mix"
HELP = "re-mix prepared data: other weights, tokens or epochs a source, without tokenizing or copying"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to `parser`."""
    parser.add_argument("data", help="folder with the mix.json to start from")
    parser.add_argument("--out", required=True, help="new folder for the new mix.json and its indices")
    for key, what in (("weight", "share of the mixture"), ("tokens", "number of tokens"), ("epochs", "passes")):
        parser.add_argument(f"--{key}", action="append", default=[], metavar="SOURCE=X", help=f"{what} of a source")
    parser.add_argument("--drop", action="append", default=[], metavar="SOURCE", help="leave a source out")
    parser.add_argument("--total-tokens", type=int, metavar="N", help="size of the whole mixture")
    parser.add_argument("--share-of", choices=("tokens", "targets"), help="what is counted (default: as in DATA)")
    parser.add_argument("--max-epochs", type=float, metavar="E", help="refuse to repeat a source more often")
    parser.add_argument("--seed", type=int, help="of the order (default: that of the old mix)")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from megatron_mixcpt.data_prep.mix import read_mix
    from megatron_mixcpt.data_prep.views import ShareRequest, remix

    wanted: dict[str, ShareRequest | None] = dict.fromkeys(args.drop)
    for key in ("weight", "tokens", "epochs"):
        for text in getattr(args, key):
            name, value = parse_request(key, text)
            if name in wanted:
                raise ConfigError(f"source {name} is named twice; give one of --weight, --tokens, --epochs, --drop")
            wanted[name] = ShareRequest(**{key: value})  # type: ignore[arg-type]
    path = remix(
        args.data,
        Path(args.out),
        wanted,
        total_tokens=args.total_tokens,
        share_of=args.share_of,
        max_epochs=args.max_epochs,
        seed=args.seed,
    )
    for source in read_mix(path).sources:
        share = source.share
        if share is None:
            print(f"{source.name}: only held out")
            continue
        print(
            f"{source.name}: asked {share.requested}, share {share.share:.4f}; "
            f"got {source.weight:.4f}, {share.tokens} {share.of}, {share.epochs:.3f} epochs"
        )
    print(path)
    return 0


def parse_request(key: str, text: str) -> tuple[str, float | int]:
    """'medquad=0.5' -> ('medquad', 0.5). Raises ConfigError."""
    name, _, number = text.rpartition("=")
    try:
        value = int(number) if key == "tokens" else float(number)
    except ValueError:
        value = 0
    if not name or not value > 0:
        raise ConfigError(f"--{key}: write SOURCE=X with X above 0, for example --{key} medquad=2 (got {text!r})")
    return name, value
