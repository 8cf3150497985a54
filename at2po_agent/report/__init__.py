"""Shows runs to a person.

Read `live` (progress), `tables` (the end of a command), `curves` (the learning curve), `plot_data`,
`fork_points` and `plots` (the figures of `at2po plot`), `tree_page` with `turn_text` (the tree viewer),
`run_report` (curve and tree of a run), `run_folder` (reads a run's files), `listings` (environments and
data). Nothing is imported here: `curves` and `plots` need matplotlib, `tree_page` jinja2.
"""
