"""Writes a tiny random Llama with tokenizer and chat template; run by the engine's own Python.

    python tiny_llama.py FOLDER

It answers any prompt with printable nonsense and never ends by itself, so that the length of an
answer is what the request asks for.
"""

from __future__ import annotations

import sys
from pathlib import Path

CONTEXT = 2048  # tokens
LAYERS = 24  # for some 10 ms a token, as a real model takes: streaming is about that
END = "<|end|>"
CORPUS = ["def add(a, b):\n    return a + b\n", "for line in lines:\n    print(line)\n"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    + END
    + "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer():
    """A byte-level BPE: any text can be written with it, code a little shorter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CORPUS, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)
    made.chat_template = CHAT_TEMPLATE
    return made


def model(words):
    """Random weights, the same each time; head_dim 64 is vLLM's least on a CPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        tie_word_embeddings=False,
    )
    made = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():  # a logit of 0 never wins over the best of 300 random ones
        made.lm_head.weight[unprintable(words)] = 0
    return made


def unprintable(words):
    """Ids of the tokens that are no ASCII text by themselves, and the one that ends an answer."""
    texts = [words.decode([number]) for number in range(len(words))]
    return [
        n
        for n, text in enumerate(texts)
        if text == END or not (text.isascii() and text.isprintable())
    ]


def main(folder: Path) -> None:
    words = tokenizer()
    made = model(words)
    made.generation_config.eos_token_id = words.eos_token_id
    made.save_pretrained(folder)
    words.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes for its owner alone; the engine is another user


if __name__ == "__main__":
    main(Path(sys.argv[1]))
