"""Shows runs to a person.

Read `live` (progress), `tables` (the end of a command), `curves` (learning curves), `tree_page` with
`turn_text` (the tree viewer), `run_report` (curve and tree of a run), `run_folder` (reads a run's files),
`listings` (environments and data). Nothing is imported here: `curves` needs matplotlib, `tree_page` jinja2.
"""
