"""Agents and tools that come with the runtime; plain Python, named in `nalar.toml` or imported."""
