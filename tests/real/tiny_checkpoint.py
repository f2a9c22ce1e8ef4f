"""A tiny Llama of fixed random weights with a tokenizer of its own, for vLLM: `python tiny_checkpoint.py FOLDER`.

Run by the interpreter that has vLLM; it needs no network. The weights are spread far wider than usual, so that greedy
text depends on the whole prompt: it is gibberish, and the same on every engine, to the last token. Weights are float32:
vLLM's bfloat16 kernels for the CPU end a decode worker (SIGILL) whose first request brings all its KV with it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from pydoc_data import topics

import torch  # pyright: ignore[reportMissingImports]
from tokenizers import (  # pyright: ignore[reportMissingImports]
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    trainers,
)
from transformers import LlamaConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]

CONTEXT = 4096
VOCABULARY = 4096
WIDTH = 64
BEGIN, END, TURN = "<s>", "</s>", "<turn>"
CHAT = "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}<turn>assistant\n"


def write_tokenizer(folder: Path) -> None:
    """Byte pairs, learned from Python's own help texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN, END, TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(topics.topics.values(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": END,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(told))


def write_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)


if __name__ == "__main__":
    write_tokenizer(Path(sys.argv[1]))
    write_model(Path(sys.argv[1]))
