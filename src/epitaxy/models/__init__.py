"""Opening base models by name or path; the small reference backbones."""
