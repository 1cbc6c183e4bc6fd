"""A wandb workspace with our curves, as code: python launch/wandb_dashboard.py --entity E --project P.

Needs `pip install -e '.[dashboard]'` in the clone and `wandb login`. Prints the address of the new workspace.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

X = "train/tokens"
# Section, then its panels: title, and a metric or a pattern over the names of the sources.
LAYOUT: dict[str, dict[str, str]] = {
    "Learned and forgotten": {
        "Validation perplexity": r"val/[^/]+/ppl",
        "Validation loss": r"val/[^/]+/loss",
        "Forgetting: change of the validation loss": r"forget/[^/]+/delta",
    },
    "Training": {
        "Loss": "train/loss",
        "Cross-entropy": "train/ce",
        "Distillation": "train/kd",
        "Swap rate": "train/swap_rate",
        "Cross-entropy by source": r"train/ce/[^/]+",
        "Share of target tokens by source": r"mix/share/[^/]+",
    },
    "Preferences": {
        "Accuracy": "rewards/accuracy",
        "Margin": "rewards/margin",
        "Distance to the reference": "rewards/kl",
        "Held-out accuracy": r"val/[^/]+/accuracy",
    },
    "Optimization": {
        "Learning rate": "optim/lr",
        "Gradient norm": "optim/grad_norm",
        "Skipped steps": "optim/skipped",
    },
    "Speed": {
        "Tokens a second and rank": "speed/tok_per_s_gpu",
        "MFU": "speed/mfu",
        "Waiting for data, %": "speed/data_pct",
        "Seconds of a step by part": r"time/[^/]+",
        "Peak memory, GiB": "mem/peak_gib",
        "Seconds of a save": "ckpt/seconds",
    },
}
SMOOTHED = ("train/", "optim/grad_norm", "speed/", "rewards/")


def build(entity: str, project: str, name: str = "megatron-mixcpt") -> Any:
    """The workspace, not saved yet. Raises ModuleNotFoundError without wandb-workspaces."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    sections = []
    for title, wanted in LAYOUT.items():
        panels: list[Any] = []
        for label, metric in wanted.items():
            which: dict[str, Any] = {"metric_regex": metric} if "[" in metric else {"y": [metric]}
            if metric.startswith(SMOOTHED):
                which |= {"smoothing_type": "exponential", "smoothing_factor": 0.6, "smoothing_show_original": True}
            panels.append(reports.LinePlot(title=label, x=X, **which))
        sections.append(workspaces.Section(name=title, panels=panels, is_open=True))
    return workspaces.Workspace(entity=entity, project=project, name=name, sections=sections)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--entity", required=True, help="user or team")
    parser.add_argument("--project", default="megatron-mixcpt", help="as wandb.project (default megatron-mixcpt)")
    parser.add_argument("--name", default="megatron-mixcpt", help="of the workspace")
    args = parser.parse_args(argv)
    try:
        workspace = build(args.entity, args.project, args.name)
    except ModuleNotFoundError as error:
        print(f"error: {error}: in the clone, pip install -e '.[dashboard]'", file=sys.stderr)
        return 1
    try:
        workspace.save()
    except Exception as error:  # of wandb, its client or the network
        print(f"error: wandb did not take the workspace ({error}); `wandb login` first?", file=sys.stderr)
        return 1
    print(workspace.url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
