"""Engine openai: a server with the interface of OpenAI's `/v1/completions`.

Requests run side by side, each sample's answer is stored when it comes. A request that fails is made again, at growing
distances; a server that gives no answer for long is gone.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from megatron_mixcpt.errors import ConfigError, MixcptError, StoppedError
from megatron_mixcpt.recall.asking import FIRST, SECOND, Ask, Asker, generator
from megatron_mixcpt.recall.config import INSTRUCTIONS, OpenAIEngine, RecallConfig
from megatron_mixcpt.recall.draw import answerable, part, sample_of
from megatron_mixcpt.recall.store import Sample, Store

FIRST_WAIT, LONGEST_WAIT = 0.5, 15.0  # seconds between two attempts
NONSENSE_LIMIT = 3  # useless answers to one request
SHOWN = 200  # characters of an answer in errors
MAX_ANSWER_BYTES = 64 << 20
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}  # codes that a busy or restarting server gives


class ServerGoneError(StoppedError):
    """No answer for longer than anybody wants to wait; what was answered is stored."""


class ServerEngine:
    """Draws blocks by asking a server."""

    def __init__(self, config: RecallConfig, asker: Asker) -> None:
        assert config.engine.openai is not None
        self._config, self._asker = config, asker
        self._client = Client(config.engine.openai)

    def draw(self, stream: str, store: Store, block: int, on_tokens: Callable[[int], None]) -> None:
        """Complete a block; what an earlier attempt has stored of it is not asked for again.

        Raises ServerGoneError (75) when the server is gone, MixcptError when it refuses or answers nonsense.
        """
        samples = {number: found for number, found in store.growing(block).items() if number in store.numbers(block)}
        wanted: queue.SimpleQueue[Ask] = queue.SimpleQueue()
        for number in store.numbers(block):
            if number not in samples:
                wanted.put(self._asker.ask(stream, number))
        left, answers = wanted.qsize(), queue.SimpleQueue[Any]()
        closing = threading.Event()

        def work() -> None:
            while not closing.is_set():
                try:
                    ask = wanted.get_nowait()
                except queue.Empty:
                    return
                try:
                    answers.put(self._sample(ask, closing))
                except MixcptError as error:
                    answers.put(error)
                except Exception as error:
                    answers.put(MixcptError(f"engine.openai: a request failed unexpectedly: {error!r}"))

        # Daemons: an answer that nobody waits for any more does not keep the process.
        for _ in range(min(self._client.settings.concurrency, left)):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in range(left):
                answer = answers.get()
                if isinstance(answer, MixcptError):
                    raise answer
                store.append(block, answer)
                samples[answer["number"]] = answer
                on_tokens(sum(len(piece["logprobs"] or ()) for piece in answer["parts"]))
        finally:
            closing.set()
        store.complete(block, [samples[number] for number in store.numbers(block)])

    def _sample(self, ask: Ask, closing: threading.Event) -> Sample:
        limits = self._config.sampling
        instruction = ask.stream == INSTRUCTIONS
        limit = limits.max_instruction_tokens if instruction else limits.max_text_tokens
        parts = [self._part(ask, 0, ask.tokens, limit, closing)]
        if instruction and answerable(self._asker, parts[0]):
            prompt = self._asker.answer_tokens(parts[0]["text"])
            parts.append(self._part(ask, 1, prompt, limits.max_answer_tokens, closing))
        return sample_of(ask, parts)

    def _part(self, ask: Ask, which: int, prompt: list[int], limit: int, closing: threading.Event) -> Sample:
        asker, sampling = self._asker, self._config.sampling
        ends = sorted(asker.ends_of(ask.stream, which))
        strings = [str(token) for token in asker.tokenizer.convert_ids_to_tokens(ends)]
        purpose = SECOND if which else FIRST
        request: dict[str, Any] = {
            "prompt": asker.decode(prompt),
            "max_tokens": limit,
            "temperature": ask.temperature,
            "top_p": sampling.top_p,
            "seed": int(generator(sampling.seed, ask.stream, ask.number, purpose).integers(2**31)),
            "stop": strings,
            "logprobs": 1,
        }
        if self._client.settings.prompts == "tokens":
            request |= {"prompt": prompt, "stop_token_ids": ends, "skip_special_tokens": False}
        text, ending, logprobs = self._client.complete(request, closing)
        for string in strings:
            text = text.removesuffix(string)
        return part((ask.opening if which == 0 else "") + text, ending, None, logprobs)


class Client:
    """Completions, with patience. Safe to use from several threads."""

    def __init__(self, settings: OpenAIEngine) -> None:
        self.settings = settings
        self._address = settings.url.rstrip("/") + "/completions"
        self._last_answer = time.monotonic()

    def complete(self, request: dict[str, Any], closing: threading.Event) -> tuple[str, str, list[float] | None]:
        """Text, ending (`end` or `limit`) and, where the server tells them, log-probabilities of its tokens."""
        began, wait, useless = time.monotonic(), FIRST_WAIT, 0
        while True:
            try:
                answer = self._post({"model": self.settings.model, **request})
                self._last_answer = time.monotonic()
                return _read(answer)
            except _Nonsense as error:
                useless += 1
                if useless == NONSENSE_LIMIT:
                    raise MixcptError(
                        f"engine.openai: {self._address} answers nonsense ({error}); is it a completions server, and "
                        f"{self.settings.model!r} one of its models?"
                    ) from None
                reason = str(error)
            except _NotNow as error:
                reason = str(error)
            quiet = time.monotonic() - max(began, self._last_answer)
            if quiet > self.settings.patience_seconds:
                raise ServerGoneError(
                    f"engine.openai: {self._address} has given no answer for {quiet:.0f} s ({reason}); what it "
                    "answered is stored: start it and run the same command to go on"
                )
            if closing.wait(min(wait, self.settings.patience_seconds / 4)):
                raise ServerGoneError("stopped while waiting for the server")
            wait = min(2 * wait, LONGEST_WAIT)

    def _post(self, body: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.settings.timeout_seconds) as response:
                return response.read(MAX_ANSWER_BYTES)
        except urllib.error.HTTPError as error:
            said = error.read(SHOWN).decode(errors="replace")
            if error.code in AGAIN:
                raise _NotNow(f"HTTP {error.code}") from None
            raise ConfigError(
                f"engine.openai: {self._address} refuses with HTTP {error.code}: {said}"
                + ("; a server that takes no token numbers wants prompts: text" if error.code in (400, 422) else "")
            ) from None
        except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut short
            raise _NotNow(str(getattr(error, "reason", None) or error) or type(error).__name__) from None


class _NotNow(Exception):
    """A failure that may pass."""


class _Nonsense(Exception):
    """An answer that is no completion."""


def _read(answer: bytes) -> tuple[str, str, list[float] | None]:
    try:
        choice = json.loads(answer)["choices"][0]
        text, reason, told = choice["text"], choice["finish_reason"], choice.get("logprobs")
        logprobs = told.get("token_logprobs") if told else None
        if logprobs is not None:
            logprobs = [float(value) for value in logprobs]
        ending = {"stop": "end", "length": "limit"}[reason]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise _Nonsense(repr(answer[:SHOWN].decode(errors="replace"))) from None
    if not isinstance(text, str):
        raise _Nonsense(repr(answer[:SHOWN].decode(errors="replace")))
    return text, ending, logprobs
