"""A tool environment of your own: typed functions, tasks, a reward; any agent can train on it."""

import gymnasium

from at2po_env import Ending, ToolContext, ToolResult, register_tool_env, tool

STOCK = {"tea": 4, "rice": 7, "salt": 2, "oil": 9, "figs": 5, "nuts": 3}


@tool(state={"counted": 0})
def count(item: str, context: ToolContext) -> ToolResult:
    """Count an item in the warehouse.

    Args:
        item: Its name.
        context: The episode's side of the call; not shown to the policy.
    """
    return ToolResult(f"{item}: {STOCK[item]}", {"counted": context.state["counted"] + 1})


def reward(ending: Ending) -> float:
    """1 for the right answer, less for every count beyond the two that are needed."""
    right = ending.answer in ending.task.golden_answers
    return max(0.0, 1.0 - 0.25 * max(0, ending.tool_states["count"]["counted"] - 2)) if right else 0.0


register_tool_env(
    "examples/Warehouse-v0",
    tools=[count],
    tasks=[
        {"question": f"How many {a} and {b} together?", "golden_answers": str(STOCK[a] + STOCK[b])}
        for a in STOCK
        for b in STOCK
        if a < b
    ],
    reward=reward,
    max_turns=5,
)

if __name__ == "__main__":
    env = gymnasium.make("examples/Warehouse-v0")
    print(env.reset(seed=0, options={"index": 0})[0])
    for action in ("<count>salt</count>", "<count>tea</count>", "<count>gold</count>", "<answer>6</answer>"):
        print(action, "->", env.step(action))
