"""Ask a server from many clients at once: tokens a second, time to the first token, and whether anything is lost.

    python examples/serve.py --adapter examples/adapters/smollm2-135m-instruct-gdn
    python examples/clients.py --clients 16                # in another terminal
    python examples/clients.py --clients 1 --requests 4    # the same with one client, to compare

You will see a line for each client as it ends, then the sums. Every client has a conversation of its own, and asks
several questions in it, one after the other.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import openai
from _common import Help, Refused, count, number, positive

QUESTIONS = (
    "Tell me about the history of bridges.",
    "Which of these was built first, and where?",
    "Write a short story that takes place on it.",
    "Now continue the story.",
)
SYSTEM = "You are a patient teacher who likes to explain things with examples, step by step, in plain words."


@dataclass(frozen=True)
class Reply:
    """What came of a request, in seconds and tokens; an error is a reply too."""

    first: float
    whole: float
    tokens: int
    error: str = ""


def converse(
    client: openai.OpenAI, model: str, number: int, requests: int, tokens: int, temperature: float
) -> list[Reply]:
    """One client: a conversation of some questions."""
    replies, name = [], f"client-{time.time():.0f}-{number}"
    for turn in range(requests):
        question = {"role": "user", "content": f"{QUESTIONS[turn % len(QUESTIONS)]} (I am number {number}.)"}
        messages = [{"role": "system", "content": SYSTEM}, question] if turn == 0 else [question]
        begin, first, used = time.monotonic(), 0.0, 0
        try:
            stream = client.chat.completions.create(
                model=model, messages=messages, max_tokens=tokens, temperature=temperature, stream=True,
                stream_options={"include_usage": True}, seed=number, extra_body={"conversation": name},
            )  # fmt: skip
            for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content and not first:
                    first = time.monotonic() - begin
                used = chunk.usage.completion_tokens if chunk.usage else used
            replies.append(Reply(first, time.monotonic() - begin, used, "" if used else "no usage came"))
        except openai.OpenAIError as error:
            replies.append(Reply(0.0, time.monotonic() - begin, 0, str(error)))
    done = sum(reply.tokens for reply in replies)
    print(f"client {number}: {len(replies)} replies, {done} tokens", flush=True)
    return replies


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Ask; returns the sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="where the server answers")
    parser.add_argument("--clients", type=positive, default=16, help="conversations at the same time")
    parser.add_argument("--requests", type=positive, default=2, help="of each client, in one conversation (default: 2)")
    parser.add_argument("--max-tokens", type=count, default=64, help="of each reply (default: 64)")
    parser.add_argument("--temperature", type=number(2), default=0, help="0 takes the best token (default: 0)")
    args = parser.parse_args(argv)
    client = openai.OpenAI(base_url=args.url, api_key="none", max_retries=0, timeout=3600)
    try:
        model = next(iter(client.models.list())).id
    except openai.OpenAIError as error:
        raise Refused(f"clients: --url {args.url}: no server answers there ({error})") from None
    begin = time.monotonic()
    with ThreadPoolExecutor(args.clients) as pool:
        futures = [
            pool.submit(converse, client, model, i, args.requests, args.max_tokens, args.temperature)
            for i in range(args.clients)
        ]
        replies = [reply for future in futures for reply in future.result()]
    seconds = time.monotonic() - begin
    good = [reply for reply in replies if not reply.error]
    result = {
        "lost": len(replies) - len(good),
        "tokens_per_second": sum(reply.tokens for reply in good) / seconds,
        "first_token_median": statistics.median(reply.first for reply in good) if good else 0.0,
        "first_token_worst": max((reply.first for reply in good), default=0.0),
    }
    print(
        f"{args.clients} clients, {len(replies)} requests in {seconds:.1f} s, {result['lost']:.0f} lost: "
        f"{result['tokens_per_second']:.1f} tokens a second, first token after {result['first_token_median']:.2f} s "
        f"(median), {result['first_token_worst']:.2f} s (worst)"
    )
    for error in sorted({reply.error for reply in replies if reply.error}):
        print(f"lost: {error}")
    return result


if __name__ == "__main__":
    main()
