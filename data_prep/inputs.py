"""Which files a source has: globs, directories and Hugging Face dataset folders resolved to a sorted list."""

import glob
import json
from pathlib import Path

from megatron_mixcpt.errors import ConfigError

JSON_LINES, TEXT, PARQUET, ARROW = "json-lines", "text", "parquet", "arrow"
SUFFIXES = {
    ".jsonl": JSON_LINES,
    ".ndjson": JSON_LINES,
    ".json": JSON_LINES,
    ".txt": TEXT,
    ".text": TEXT,
    ".md": TEXT,
    ".parquet": PARQUET,
    ".arrow": ARROW,
}
COMPRESSED = (".gz", ".zst")


def file_format(path: str | Path) -> str | None:
    """The record format a file's name promises, or None. `.gz` and `.zst` may follow json lines and text."""
    path = Path(path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        found = SUFFIXES.get(suffixes[-2]) if len(suffixes) > 1 else None
        return found if found in (JSON_LINES, TEXT) else None
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def resolve_paths(patterns: list[str], source: str) -> list[Path]:
    """All input files of a source, each once, sorted. Raises ConfigError for a pattern that finds nothing usable."""
    files: set[Path] = set()
    for pattern in patterns:
        matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
        if not matches:
            raise ConfigError(f"source {source}: no file matches {pattern!r} (seen from {Path.cwd()})")
        for match in matches:
            if match.is_dir():
                files.update(_in_directory(match, source))
            elif file_format(match) is None:
                raise ConfigError(
                    f"source {source}: {match} has an unknown ending; known: {', '.join(SUFFIXES)}, "
                    f"and {' or '.join(COMPRESSED)} after json lines and text"
                )
            else:
                files.add(match)
    return sorted(files)


def _in_directory(folder: Path, source: str) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text()).get("splits", [])
        raise ConfigError(
            f"source {source}: {folder} holds several splits; name the one to train on: "
            + " or ".join(str(folder / split) for split in splits)
        )
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        state = json.loads((folder / "state.json").read_text())
        return [folder / item["filename"] for item in state["_data_files"]]
    found = [
        path
        for path in folder.rglob("*")
        if path.is_file()
        and file_format(path)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise ConfigError(f"source {source}: the directory {folder} holds no file with a known ending")
    formats = {file_format(path): path for path in sorted(found)}
    if len(formats) > 1:  # e.g. a README.md beside parquet files, which nobody wants to train on
        seen = ", ".join(f"{name} ({path.name})" for name, path in formats.items())
        raise ConfigError(f"source {source}: {folder} holds files of several kinds: {seen}; name the files with a glob")
    return found
