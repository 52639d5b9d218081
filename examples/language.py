"""A causal language model: LoRA, prefix and norms in one adapter, trained by the Trainer of transformers."""

from __future__ import annotations

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import epitaxy

SENTENCE = [5, 17, 3, 29, 11, 23, 7, 31]


def main(steps: int = 40) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)  # in earnest: AutoModelForCausalLM.from_pretrained("your/model")

    method = epitaxy.LoRA(at="linear", rank=4) + epitaxy.Prefix(tokens=4) + epitaxy.NormTuning()
    epitaxy.attach(model, method + epitaxy.Head(), name="sentence")
    examples = [{"input_ids": SENTENCE, "labels": SENTENCE} for _ in range(64)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            report_to=[],
            save_strategy="no",
            logging_steps=steps,
            disable_tqdm=True,
            use_cpu=True,
        )
        Trainer(model=model, args=arguments, train_dataset=examples).train()  # type: ignore[arg-type]

    start = torch.tensor([SENTENCE[:2]])
    told = model.generate(start, max_new_tokens=6, do_sample=False, pad_token_id=0)[0].tolist()
    epitaxy.activate(model, None)
    bare = model.generate(start, max_new_tokens=6, do_sample=False, pad_token_id=0)[0].tolist()
    print(f"with the adapter {told}\nthe bare base    {bare}\nlearned: {told == SENTENCE}")


if __name__ == "__main__":
    main()
