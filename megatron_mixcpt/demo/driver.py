"""The demo from the first file to the report. Everything between is what a user of `mixcpt` would run by hand."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mixcpt import __version__
from megatron_mixcpt.demo import configs
from megatron_mixcpt.demo.base_model import save_smollm2, save_tiny_tokenizer
from megatron_mixcpt.demo.commands import run_mixcpt, training_progress
from megatron_mixcpt.demo.console import DemoConsole
from megatron_mixcpt.demo.report import how_measured, metrics_table, verdict, write_report
from megatron_mixcpt.demo.settings import Settings
from megatron_mixcpt.demo.stages import Done, Progress, Stages, open_folder
from megatron_mixcpt.demo.texts import read_probe, read_training_texts, write_texts
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.units import duration

ARM_TITLES = {
    "pretrain": "Pre-training the tiny model on general text",
    "cpt": "Plain continual pre-training (arm `cpt`)",
    "aligned": "Alignment: a few samples of the mixture teach the format (SFT, then DPO)",
    "recall": "Mix-CPT from documents and a model alone: it writes what it rehearses (arm `recall`)",
    "mixcpt": "Mix-CPT: knowledge mixture and logit-swap self-distillation (arm `mixcpt`)",
}


@dataclass(frozen=True)
class Demo:
    """One run of the demo in `folder`; `with_recall` adds the arm that rehearses what the model wrote itself."""

    settings: Settings
    folder: Path
    console: DemoConsole
    stages: Stages
    threads: int
    with_recall: bool = False

    def run(self) -> dict[str, Any]:
        """Run all stages that are not yet done and write the report; returns the measurements of all models."""
        settings, folder, console = self.settings, self.folder, self.console
        # One base a model: a folder may see `--model tiny` after `--model smollm2` and the other way round.
        texts, base = folder / "texts", folder / f"base-{settings.model}"
        console.heading("Texts and base model")
        done: dict[str, Done] = {}
        # Quick enough to be done every time: what follows then depends on the texts themselves.
        counts, fingerprint = write_texts(settings, texts)
        console.say("  Inventing facts: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
        if settings.pretrain_steps:
            done |= self._pretrain(texts, fingerprint, base)
        else:
            done["base"] = self.stages.run(
                "base", f"Unpacking {settings.title}", [__version__], [base], lambda progress: save_smollm2(base)
            )
        console.heading("Before: what the base model knows")
        done["base-measure"] = self._measure("base", base, texts, fingerprint, done["base"])
        trained = ["cpt", "mixcpt"] + ["recall"] * self.with_recall
        for arm in trained:
            console.heading(ARM_TITLES[arm])
            start = done["base"]
            if arm == "recall":
                start = done["recall-draw"] = self._recall(base, start)
            done |= self._train(arm, base, texts, fingerprint, base, start)
            exported = done[f"{arm}-export"]
            done[f"{arm}-measure"] = self._measure(arm, folder / arm / "hf", texts, fingerprint, exported)
        console.heading(ARM_TITLES["aligned"])
        done |= self._align(done["mixcpt-train"])
        done["aligned-measure"] = self._measure(
            "aligned", folder / "aligned" / "hf", texts, fingerprint, done["aligned-export"]
        )
        arms = {arm: done[f"{arm}-measure"].result for arm in ("base", *trained, "aligned")}
        self._report(arms, done)
        return arms

    def _pretrain(self, texts: Path, fingerprint: str, base: Path) -> dict[str, Done]:
        """Make a base model out of nothing: a tokenizer, then cross-entropy on general text."""
        tokenizer = self.folder / "tokenizer"
        tokenized = self.stages.run(
            "tokenizer", "Training a tokenizer", [__version__, fingerprint], [tokenizer],
            lambda progress: save_tiny_tokenizer(read_training_texts(texts), tokenizer),
        )  # fmt: skip
        self.console.heading(ARM_TITLES["pretrain"])
        done = self._train("pretrain", base, texts, fingerprint, tokenizer, tokenized)
        done["base"] = done.pop("pretrain-export")
        return {"tokenizer": tokenized, **done}

    def _train(
        self, arm: str, base: Path, texts: Path, fingerprint: str, tokenizer: Path, after: Done
    ) -> dict[str, Done]:
        """preprocess, train and export one arm. The pre-training arm exports to `base`, the others start from there."""
        settings, folder = self.settings, self.folder / arm
        data, run_dir = folder / "data", folder / "run"
        out = base if arm == "pretrain" else folder / "hf"
        steps = settings.pretrain_steps if arm == "pretrain" else settings.steps
        preprocess = configs.preprocess_yaml(settings, arm, texts, tokenizer, data)
        train = configs.train_yaml(settings, arm, base, data / "mix.json", run_dir)
        log = self.folder / "logs" / f"{arm}.log"

        def prepare(progress: Progress) -> None:
            path = _write(folder / "preprocess.yaml", preprocess)
            run_mixcpt(["preprocess", str(path)], log, threads=self.threads)

        def fit(progress: Progress) -> None:
            path = _write(folder / "train.yaml", train)
            command = ["train", str(path)] + (["--nproc", str(settings.tensor)] if settings.tensor > 1 else [])
            poll = training_progress(run_dir, steps, progress)
            run_mixcpt(command, log, threads=max(1, self.threads // settings.tensor), poll=poll)

        def export(progress: Progress) -> None:
            run_mixcpt(["export", str(run_dir), "--out", str(out)], log, threads=self.threads)

        tokens = f"{steps} steps of {settings.seq_length * _batch(settings, arm):,} tokens"
        run = self.stages.run
        prepared = run(
            f"{arm}-data", "mixcpt preprocess", [__version__, preprocess, fingerprint], [data], prepare, [after]
        )
        trained = run(f"{arm}-train", f"mixcpt train: {tokens}", [__version__, train], [run_dir], fit, [prepared])
        exported = run(f"{arm}-export", "mixcpt export", [__version__], [out], export, [trained])
        return {f"{arm}-data": prepared, f"{arm}-train": trained, f"{arm}-export": exported}

    def _recall(self, base: Path, after: Done) -> Done:
        """Let the base model write what the arm `recall` rehearses."""
        settings, folder = self.settings, self.folder / "recall"
        out = folder / configs.DRAWN
        text = configs.recall_yaml(settings, base, out)

        def draw(progress: Progress) -> None:
            path = _write(folder / "recall.yaml", text)
            command = ["recall", str(path)] + (["--nproc", str(self.threads)] if self.threads > 1 else [])
            run_mixcpt(command, self.folder / "logs" / "recall.log", threads=1)

        title = f"mixcpt recall: {settings.recall_instructions} instructions, {settings.recall_texts} texts"
        return self.stages.run("recall-draw", title, [__version__, text], [out], draw, [after])

    def _align(self, trained: Done) -> dict[str, Done]:
        """select, SFT, DPO and export, from the `mixcpt` arm."""
        settings, folder = self.settings, self.folder / "aligned"
        start, selected = self.folder / "mixcpt" / "run", folder / "selected"
        log = self.folder / "logs" / "aligned.log"
        ranks = ["--nproc", str(settings.tensor)] if settings.tensor > 1 else []
        threads = max(1, self.threads // settings.tensor)
        select = configs.select_yaml(settings, start, self.folder / "mixcpt" / "data" / "mix.json", selected)

        def choose(progress: Progress) -> None:
            path = _write(folder / "select.yaml", select)
            run_mixcpt(["select", str(path), *ranks], log, threads=threads)

        done = {}
        title = f"mixcpt select: {settings.select_instructions} instructions, {settings.select_pairs} pairs"
        after = done["aligned-select"] = self.stages.run(
            "aligned-select", title, [__version__, select], [selected], choose, [trained]
        )
        for method, steps in (("sft", settings.sft_steps), ("dpo", settings.dpo_steps)):
            run_dir = folder / method
            text = configs.align_yaml(settings, method, start, selected / method / "mix.json", run_dir)

            def fit(
                progress: Progress, path: Path = folder / f"{method}.yaml", text: str = text, run_dir: Path = run_dir,
                steps: int = steps,
            ) -> None:  # fmt: skip
                poll = training_progress(run_dir, steps, progress)
                run_mixcpt(["align", str(_write(path, text)), *ranks], log, threads=threads, poll=poll)

            after = done[f"aligned-{method}"] = self.stages.run(
                f"aligned-{method}",
                f"mixcpt align, {method}: {steps} steps",
                [__version__, text],
                [run_dir],
                fit,
                [after],
            )
            start = run_dir
        out = folder / "hf"
        done["aligned-export"] = self.stages.run(
            "aligned-export", "mixcpt export", [__version__], [out],
            lambda progress: run_mixcpt(["export", str(start), "--out", str(out)], log, threads=self.threads), [after],
        )  # fmt: skip
        return done

    def _measure(self, name: str, hf_dir: Path, texts: Path, fingerprint: str, model: Done) -> Done:
        from megatron_mixcpt.demo.probe import measure

        done = self.stages.run(
            f"{name}-measure", "Measuring", [__version__, fingerprint], [],
            lambda progress: measure(hf_dir, read_probe(texts), progress), [model],
        )  # fmt: skip
        result = done.result
        self.console.say(
            f"    facts answered {result['fact_recall']:.0%}, completed {result['fact_completion']:.0%}, "
            f"in the asked format {result['format_following']:.0%}; "
            f"perplexity: domain {result['domain_ppl']:.2f}, general {result['general_ppl']:.2f}"
        )
        return done

    def _report(self, arms: dict[str, Any], done: dict[str, Done]) -> None:
        settings = self.settings
        write_report(
            self.folder,
            arms,
            title=f"Teaching {settings.title} {settings.num_people * 5} facts that exist nowhere",
            settings=self._described(),
            seconds=[(name, receipt.seconds) for name, receipt in done.items()],
        )
        self.console.close()
        self.console.heading("Result")
        self.console.say(metrics_table(arms).markdown())
        self.console.say(f"\n{how_measured(arms)}\n\n{verdict(arms)}")
        self.console.say(f"\nReport: {self.folder}/report.html  (report.md, report.json; logs and configs beside it)")
        self.console.say(f"This run took {duration(self.console.elapsed)}.")

    def _described(self) -> list[tuple[str, str]]:
        settings = self.settings
        shares = (settings.domain_weight, settings.instruction_weight, settings.preference_weight)
        return [
            ("model", settings.title),
            ("facts", f"{settings.num_people} people, {settings.documents_per_person} documents each"),
            (
                "training",
                f"{settings.steps} steps of {settings.tokens_per_step} tokens, fp32, AdamW, lr {settings.lr:g}, cosine",
            ),
            ("cpt", "domain documents only; cross-entropy"),
            (
                "mixcpt",
                "{:.0%} domain, {:.0%} general instructions, {:.0%} general preferences (chosen); ".format(*shares)
                + "cross-entropy + 1.0 x KL to the logit-swapped initial model, divided by 2",
            ),
            (
                "aligned",
                f"mixcpt, then {settings.sft_steps} steps of SFT (lr {settings.sft_lr:g}) on the "
                f"{settings.select_instructions} easiest instructions and {settings.dpo_steps} steps of DPO "
                f"(lr {settings.dpo_lr:g}, beta 0.1) on the {settings.select_pairs} easiest pairs of the mixture",
            ),
            *[("recall", _rehearsal(settings))] * self.with_recall,
            ("layout", f"tensor parallel {settings.tensor}, {self.threads} threads in all"),
            (
                "machine",
                f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}, Python {platform.python_version()}",
            ),
            ("seed", str(settings.seed)),
        ]


def run_demo(settings: Settings, folder: Path, *, fresh: bool = False, with_recall: bool = False) -> dict[str, Any]:
    """Run the demo in `folder`, continuing where an earlier run stopped unless `fresh`; returns the measurements.

    Raises ConfigError if `folder` holds something else or the model cannot write what it is to rehearse, MixcptError
    with the end of the log if a command fails.
    """
    if with_recall and not settings.recall_instructions:
        raise ConfigError(f"--arm recall: {settings.title} has no chat template to write from; use --model smollm2")
    with open_folder(folder, fresh=fresh):
        threads = len(os.sched_getaffinity(0))
        stages = settings.expected_seconds.items()
        console = DemoConsole({name: s for name, s in stages if with_recall or not name.startswith("recall-")})
        console.say(f"Mix-CPT demo: teach {settings.title} facts that exist nowhere, and see what it forgets.")
        console.say(f"Output: {folder}. Stop it whenever you like: the same command goes on where it stopped.")
        try:
            import torch

            torch.set_num_threads(max(1, threads // settings.tensor))  # as many as a process of the training has
            return Demo(settings, folder, console, Stages(folder, console), threads, with_recall).run()
        finally:
            console.close()


def _rehearsal(settings: Settings) -> str:
    return (
        f"as mixcpt, but {settings.instruction_weight:.0%} instructions (of {settings.recall_instructions} drawn) and "
        f"{settings.preference_weight:.0%} general text (of {settings.recall_texts}) that the model itself wrote"
    )


def _batch(settings: Settings, arm: str) -> int:
    return settings.pretrain_global_batch_size if arm == "pretrain" else settings.global_batch_size


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
