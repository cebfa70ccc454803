"""Ways in which real RLHF systems are wrong, each as a knob of a run: one file a fault."""
