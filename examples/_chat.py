"""What llama.py, qwen.py, mistral.py and gemma3.py share: a chat in bounded memory, with live memory figures."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _common import (
    Help,
    add_device_options,
    add_memory_options,
    find_adapter,
    give_memory,
    positive,
    refuse_model,
    user_errors,
)
from smollm2 import load_causal_lm
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast, TextStreamer

from ahn_layers import HippocampalCache

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
"""Sizes of a model with random weights."""
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
LONG = 2048
"""Tokens from which on reading is worth a bar."""
_MARK = "@reply@"


class Chat:
    """A conversation over one cache: every token is read once, however many turns follow.

    Args:
        model: a retrofitted model.
        tokenizer: its tokenizer, with a chat template.
        piece: tokens read per call of the model: bounds the activations. By default ``generate`` chooses.
    """

    def __init__(self, model: Any, tokenizer: Any, piece: int | None = None) -> None:
        self.model, self.tokenizer, self.piece = model, tokenizer, piece
        self.cache = HippocampalCache()
        self.ids = torch.empty(1, 0, dtype=torch.long, device=model.device)

    def say(self, message: str, max_new_tokens: int) -> str:
        """Add a message, and stream the model's reply to standard output."""
        new = self.tokenizer(self._format(message), add_special_tokens=False, return_tensors="pt", verbose=False)
        self.ids = torch.cat((self.ids, new.input_ids.to(self.ids.device)), dim=1)
        asked = self.ids.shape[1]
        with self._progress(asked - self.cache.get_seq_length()):
            out = self.model.generate(
                self.ids,
                attention_mask=torch.ones_like(self.ids),
                cache=self.cache,
                max_new_tokens=max_new_tokens,
                prefill_chunk_size=self.piece,
                streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
                pad_token_id=self.tokenizer.eos_token_id,
                **GREEDY,
            )
        ends = torch.tensor(self.model.generation_config.eos_token_id, device=out.device)
        ended = bool(torch.isin(out[0, -1], ends))
        self.ids = out[:, :-1] if ended else out  # the template of the next message closes the turn
        return str(self.tokenizer.decode(out[0, asked:], skip_special_tokens=True))

    def figures(self) -> str:
        """Bytes that the cache holds, and what full attention would hold by now."""
        tokens, held = self.cache.get_seq_length(), self.cache.nbytes
        capacity = max(window.capacity for window in self.model.hippocampus.windows.values())
        if tokens <= capacity:
            return f"{tokens:,} tokens, cache {held / 1e6:.2f} MB, it grows up to {capacity:,} tokens"
        token = others = 0  # bytes of a token where full attention would be; what other layers hold in any case
        for index, layer in enumerate(self.cache.layers):
            for u in (layer.keys, layer.values):
                if index in self.model.hippocampus.layers:
                    token += u.nbytes // u.shape[2]
                else:
                    others += u.nbytes
        full = f"full attention {(tokens * token + others) / 1e6:.2f} MB"
        pays = tokens * token + others > held
        pays = "" if pays else f", which is more from {(held - others) // token + 1:,} tokens on"
        return f"{tokens:,} tokens, cache {held / 1e6:.2f} MB, it grows no further; {full}{pays}"

    def _format(self, message: str) -> str:
        """The message in the chat template, behind the end of the reply before it, if there was one."""
        turns = [{"role": "user", "content": message}]
        begun = self.ids.shape[1] > 0
        if begun:
            turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": _MARK}, *turns]
        text: str = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return text.split(_MARK)[-1] if begun else text

    @contextmanager
    def _progress(self, count: int) -> Iterator[None]:
        """Within this context, a bar of the tokens that are read, if a document is among them."""
        if count < LONG:
            yield
            return
        with tqdm(total=count, desc="reading", unit=" tokens") as bar:

            def note(_: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
                bar.update(kwargs["input_ids"].shape[1])
                bar.set_postfix_str(self.figures())
                if bar.n >= count:  # the reply begins
                    handle.remove()
                    bar.close()

            handle = self.model.register_forward_hook(note, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()


def main(argv: Sequence[str] | None, *, description: str, config: PretrainedConfig, default: str | None) -> list[str]:
    """Chat with a model of one family.

    Args:
        argv: command line, None for the process's own.
        description: docstring of the script.
        config: of the model that ``--random-weights`` makes.
        default: hub id, None for SmolLM2-135M-Instruct.

    Returns:
        The replies.
    """
    args = _parse(argv, description, default)
    with user_errors(Path(sys.argv[0]).stem or "chat"):
        document = f"{args.document.read_text(encoding='utf-8')}\n\n" if args.document else ""
        adapter = find_adapter(args.adapter)
        if args.random_weights:
            refuse_model(None if args.model == default else args.model)
            model, tokenizer = random_model(config)
            model = model.to(args.device, getattr(torch, args.dtype))
        else:
            model, tokenizer = _load(args)
        give_memory(model, adapter, window=args.window, sinks=args.sinks, compressor=args.compressor)
    if not args.adapter:
        print("No --adapter: the memory is untrained and adds nothing. What has left the window is forgotten.")
    chat, replies = Chat(model, tokenizer, args.piece), []
    for prompt in args.prompt or _typed():
        replies.append(chat.say(document + prompt, args.max_new_tokens))
        print(f"[{chat.figures()}]")
        document = ""
    return replies


def _parse(argv: Sequence[str] | None, description: str, default: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=Help)
    parser.add_argument(
        "--model", default=default, help=f"folder or hub id (default: {default or 'SmolLM2-135M-Instruct'})"
    )
    parser.add_argument("--random-weights", action="store_true", help="a tiny model with random weights: no network")
    parser.add_argument("--adapter", help="trained memory: folder, file or hub id (default: none)")
    add_memory_options(parser)
    parser.add_argument("--document", type=Path, help="text file that stands before the first message")
    parser.add_argument("--prompt", action="append", help="message, may be repeated (default: type them)")
    parser.add_argument("--max-new-tokens", type=positive, default=256, help="tokens of a reply, at most")
    parser.add_argument(
        "--piece", type=positive, help="tokens of a document read at a time (default: as generate does)"
    )
    add_device_options(parser)
    return parser.parse_args(argv)


def _typed() -> Iterator[str]:
    """Messages from the keyboard, until an empty line or the end of input."""
    try:
        while message := input("> "):
            yield message
    except (EOFError, KeyboardInterrupt):
        return


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    model, tokenizer = load_causal_lm(args.model, getattr(torch, args.dtype), args.device)
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{args.model}: its tokenizer has no chat template. Name an instruct or chat model by --model."
        )
    return model, tokenizer


def random_model(config: PretrainedConfig) -> tuple[Any, Any]:
    """A model with random weights, and a tokenizer with one token per byte."""
    names = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytewise = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    bytewise.add_special_tokens([AddedToken(name, special=True) for name in names[:2]])
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, bos_token=names[0], eos_token=names[1])
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.chat_template = (
        "<s>{% for turn in messages %}[{{ turn.role }}] {{ turn.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    torch.manual_seed(0)
    config.vocab_size, config.bos_token_id, config.eos_token_id = len(names), 0, 1
    return AutoModelForCausalLM.from_config(config).eval(), tokenizer
