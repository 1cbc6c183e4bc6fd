"""What `mixcpt verify` found."""

from dataclasses import dataclass, field


@dataclass
class Findings:
    """What verification saw. `problems` empty means that everything is in order."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_files: int = 0
    num_bytes: int = 0
    num_prefixes: int = 0
    num_tokens: int = 0
    seconds: float = 0.0  # spent on files and flags
    num_records: int = 0  # sampled and found again in their source
