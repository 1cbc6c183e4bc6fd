"""Stands in for wandb in the writer's process: does what FAKE_WANDB says, and notes the calls in FAKE_WANDB_CALLS."""

import json
import os
import time

BEHAVIOUR = os.environ["FAKE_WANDB"]
if BEHAVIOUR == "absent":
    raise ModuleNotFoundError("No module named 'wandb'")


def note(call, *args, **kwargs):
    with open(os.environ["FAKE_WANDB_CALLS"], "a") as file:
        file.write(json.dumps([call, args, kwargs], default=str) + "\n")


class Settings:
    def __init__(self, **values):
        note("settings", **values)


class Artifact:
    def __init__(self, name, type):
        if BEHAVIOUR == "no artefacts":
            raise OSError("no space left")
        self.name = name

    def add_file(self, path):
        note("file", self.name, path)


class Run:
    id, dir, url = "fake", "there/files", None

    def define_metric(self, *args, **kwargs):
        note("define", *args, **kwargs)

    def log(self, values, step):
        if BEHAVIOUR == "raise in log":
            raise RuntimeError("the server said no\nand more")
        if BEHAVIOUR == "hang in log":
            time.sleep(3600)
        note("log", values, step=step)

    def log_artifact(self, artifact, aliases=None):
        note("artifact", artifact.name, aliases)

    def finish(self, exit_code):
        note("finish", exit_code)


def teardown():
    note("teardown")


def init(**values):
    note("init", **values)
    if BEHAVIOUR == "no network" and values["mode"] == "online":
        raise TimeoutError("no answer")
    if BEHAVIOUR == "raise in init":
        raise ValueError("bad key")
    if BEHAVIOUR == "hang in init":
        time.sleep(3600)
    return Run()
