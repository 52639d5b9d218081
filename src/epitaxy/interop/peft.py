"""PEFT's LoRA files."""
