"""A completions server around the very small model: python -m tests.recall.completions MODEL PORT MODE.

MODE: tokens or text (how prompts must come), nonsense (200 and a page of HTML), refuse (400).
Every request is noted on stdout, a line each.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock

MODE = sys.argv[3]
ALONE = Lock()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if MODE == "nonsense":
            return self._answer(200, b"<html>welcome</html>")
        if MODE == "refuse" or self.path != "/v1/completions" or isinstance(request["prompt"], str) != (MODE == "text"):
            return self._answer(400, b'{"error": "no such model"}')
        with ALONE:
            print(json.dumps([request["prompt"], request["seed"]]), flush=True)
            self._answer(200, json.dumps(complete(request)).encode())

    def _answer(self, code, body):
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def complete(request):
    """As a server does it: the text without the stop string, and a log-probability a token."""
    import numpy as np

    from megatron_mixcpt.recall.generate import Prompt, continue_prompts

    prompt = request["prompt"]
    tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"] if isinstance(prompt, str) else prompt
    ends = tokenizer.convert_tokens_to_ids(request["stop"])
    uniform = np.random.default_rng(request["seed"]).random(request["max_tokens"])
    (found,) = continue_prompts(
        model,
        [Prompt(tokens, request["temperature"], uniform)],
        top_p=request["top_p"],
        ends=ends,
        controls=[],
        batch_size=1,
    )
    reason = {"end": "stop", "limit": "length"}[found.ending]
    logprobs = {"token_logprobs": found.logprobs}
    return {"choices": [{"text": tokenizer.decode(found.tokens), "finish_reason": reason, "logprobs": logprobs}]}


if __name__ == "__main__":
    if MODE in ("tokens", "text"):
        import torch

        from megatron_mixcpt.evaluate.loading import load_directory

        torch.set_num_threads(1)
        model, tokenizer = load_directory(sys.argv[1])
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
