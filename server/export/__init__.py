"""``offsite export``: an adapter as other servers load it: a PEFT folder for vLLM, a GGUF file for llama.cpp."""

__all__ = ["config", "export"]
