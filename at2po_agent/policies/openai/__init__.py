"""Models behind OpenAI's protocol as a policy."""

from at2po_agent.policies.openai.policy import OpenAIPolicy

__all__ = ["OpenAIPolicy"]
