"""What travels in a step, by formula: a file for each dimension of the plan, as in titan/parallel."""
