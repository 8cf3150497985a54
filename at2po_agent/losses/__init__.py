"""Policy losses, one small file per family."""
