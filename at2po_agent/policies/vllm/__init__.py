"""vLLM as a policy; imports without vLLM."""

from at2po_agent.policies.vllm.policy import VLLMPolicy

__all__ = ["VLLMPolicy"]
