"""What learns from rollouts: the FSDP2 model, batches, objectives, the step, supervised warm start.

Nothing is imported here, so that reading `asyncrl.learner.config` does not load torch.
"""
