"""An adapter on a model sharded by FSDP2: same outputs, gradients, and a save that holds whole tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import epitaxy

dist.init_process_group("gloo")
torch.manual_seed(0)
config = transformers.ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8
)
model = transformers.ViTForImageClassification(config).eval()
method = epitaxy.LoRA(rank=4) + epitaxy.BitFit() + epitaxy.Prompt(tokens=3) + epitaxy.Prefix(tokens=2, gated=True)
adapter = epitaxy.attach(model, method, name="sharded")
for parameter in adapter.parameters():
    parameter.data.add_(torch.randn_like(parameter) * 0.1)
pixels = torch.randn(4, 3, 16, 16)
expected = model(pixel_values=pixels).logits.detach()
saved_before = epitaxy.save(model, f"{sys.argv[1]}/whole{dist.get_rank()}")

mesh = init_device_mesh("cpu", (2,))
for layer in model.vit.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
output = model(pixel_values=pixels).logits
torch.testing.assert_close(output, expected)
output.sum().backward()
assert all(parameter.grad is not None for parameter in adapter.parameters())
epitaxy.save(model, f"{sys.argv[1]}/sharded")
dist.barrier()
from safetensors.torch import load_file

whole = load_file(f"{sys.argv[1]}/whole0/adapter.safetensors")
gathered = load_file(f"{sys.argv[1]}/sharded/adapter.safetensors")
assert whole.keys() == gathered.keys()
assert all(torch.equal(whole[key], gathered[key]) for key in whole)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_fsdp_trains_and_saves_whole_tensors(tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
