"""What comes from outside this node. For now: bundles dropped into the inbox."""
