"""The model card written beside a saved adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml


def render(config: Mapping[str, Any], parameters: int) -> str:
    """Markdown with the front matter that model hubs read; ``config`` is what ``adapter.json`` holds."""
    base, provenance = config["base"], config.get("provenance", {})
    front: dict[str, Any] = {"library_name": "epitaxy", "tags": [entry["method"] for entry in config["methods"]]}
    if base.get("source"):
        front = {"base_model": base["source"], "base_model_relation": "adapter", **front}
    if provenance.get("license"):
        front["license"] = provenance["license"]
    methods = "\n".join(
        f"- `{entry['method']}`: " + ", ".join(f"{key} = {value}" for key, value in entry.items() if key != "method")
        for entry in config["methods"]
    )
    facts = "\n".join(f"- {key}: {value}" for key, value in sorted(provenance.items()))
    name = config["name"]
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {name}\n\n"
        f"An adapter of {parameters:,} parameters for a `{base['model_class']}` ({base['family']}).\n\n"
        f'{methods}\n\n## Use\n\n```python\nimport epitaxy\n\nepitaxy.load(model, "path/to/{name}")\n```\n\n'
        f"## Made with\n\n{facts}\n"
    )
