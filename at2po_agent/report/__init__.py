"""What a person looks at: learning curves, the table at the end of a run, live progress, the tree viewer.

Nothing is imported here: `curves` needs matplotlib, `tree_page` jinja2, `run_report` the configuration.
"""
