"""What a run would need, worked out without allocating a weight: `at2po train CONFIG run.dry_run=true`."""

from typing import Any

from at2po_agent.agents.agent import build_weights
from at2po_agent.config.sections import Config

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def plan_run(config: Config) -> dict[str, Any]:
    """Build the model on torch's meta device and count.

    Returns:
        parameters; weights_gb, gradients_gb and optimizer_gb (two moments); leaves and most tokens of a step
        (responses at their limit, prompts included, prefixes once per leaf); updates of a step; steps.
    """
    model = build_weights(config, vocab_size=config.model.vocab_size, device="meta")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    gigabytes = parameters * _BYTES[config.model.dtype] / 1e9
    train, rollout = config.train, config.rollout
    leaves = train.questions * rollout.leaves
    return {
        "parameters": parameters,
        "weights_gb": round(gigabytes, 2),
        "gradients_gb": round(gigabytes, 2),
        "optimizer_gb": round(2 * gigabytes, 2),
        "leaves_per_step": leaves,
        "most_tokens_per_step": leaves * (rollout.max_prompt_tokens + rollout.max_response_tokens),
        "updates_per_step": train.epochs * max(1, train.questions // train.minibatch_questions),
        "steps": train.steps,
    }


def describe_plan(config: Config, plan: dict[str, Any]) -> str:
    """The plan as a few lines for a person."""
    memory = plan["weights_gb"] + plan["gradients_gb"] + plan["optimizer_gb"]
    shape, questions = config.rollout, config.train.questions
    lines = [
        f"model      {plan['parameters']:,} parameters in {config.model.dtype}",
        f"memory     {memory:,.1f} GB for weights, gradients and AdamW; activations and sampler come on top",
        f"one step   {questions} questions x {shape.leaves} leaves = {plan['leaves_per_step']:,} "
        f"episodes, at most {plan['most_tokens_per_step']:,} tokens, {plan['updates_per_step']} updates",
        f"algorithm  {config.algorithm.preset}: {shape.expansion} / {config.algorithm.credit} / "
        f"{config.algorithm.loss}",
        f"the run    {plan['steps']:,} steps on {config.env.id}",
        "dry run: nothing was allocated, nothing was written",
    ]
    return "\n".join(lines)
