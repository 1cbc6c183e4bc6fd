"""In place of the processes of a study: what they would have written."""

import threading
import time
from pathlib import Path

import yaml

from megatron_mixcpt.config import load_config
from megatron_mixcpt.evaluate.gci import Answer, summarize
from megatron_mixcpt.evaluate.held_out import SourcePerplexity
from megatron_mixcpt.evaluate.stored import rows_of
from megatron_mixcpt.files import write_json
from megatron_mixcpt.study.cells import BASE, Cells
from megatron_mixcpt.study.config import Study


def read(path):
    return Cells(load_config(Study, path), path)


def made_up(lr, seed, alpha):
    """What a model learned and forgot: more with the learning rate, and a little other with every seed."""
    gain, forgotten = alpha * (lr * 100 + seed / 100), alpha * lr * 20
    answers = [Answer(str(n), "speech", f"Say {n} <&>", "Yes.", n < 3 + 2 * gain, True, -0.5) for n in range(6)]
    sources = [SourcePerplexity("facts", "domain", 8.0 * 2.718281828**-gain)]
    sources += [SourcePerplexity("tasks", "instruction", 9.0 * 2.718281828**forgotten)]
    return rows_of({"sources": sources, "gci": summarize(answers), "gci_answers": answers})


class Pretended:
    """In place of the processes of a study: what they would have written, and who was called."""

    def __init__(self, cells, failing=(), seconds=0.0):
        self.cells, self.failing, self.seconds = cells, list(failing), seconds
        self.trained, self.measured, self.at_once, self.most = [], [], 0, 0
        self.lock = threading.Lock()

    def __call__(self, team, command, log, environment):
        if "megatron_mixcpt.cli" in command:
            values = yaml.safe_load(Path(command[command.index("train") + 1]).read_text())
            with self.lock:
                self.trained.append(values["run_dir"])
                self.at_once += 1
                self.most = max(self.most, self.at_once)
            time.sleep(self.seconds)
            with self.lock:
                self.at_once -= 1
            if any(name in values["run_dir"] for name in self.failing):
                return 3, "the data is damaged"
            return 0, ""
        self.measured.append(command[-1])
        if command[-1] == BASE:
            write_json(self.cells.base_file, {"1": made_up(0.0, 0, 1.0)})
            return 0, ""
        cell = self.cells.named(command[-1])
        alphas = {f"{alpha:g}": made_up(cell.lr, cell.seed, alpha) for alpha in self.cells.missing(cell)}
        write_json(self.cells.measured_file(cell), self.cells.measured(cell) | alphas)
        return 0, ""
