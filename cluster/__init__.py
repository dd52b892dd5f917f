"""Both jobs on a cluster of nodes. Nothing stands here yet."""
