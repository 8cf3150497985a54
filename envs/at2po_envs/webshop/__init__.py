"""WebShop: buy what a customer asks for, in a shop of text pages.

Read `pages` (what a page shows and where a click leads) and `env` (the commands) first; then `goals`,
`reward`, `products` (the original's files), `shop` (the folder they are converted into), `expert` and
`making`.
"""

from at2po_envs.webshop.making import make, make_vector

__all__ = ["make", "make_vector"]
