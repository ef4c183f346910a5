"""What makes rollouts: engines behind one protocol, the dispatcher that keeps them busy, prompts and rewards.

Imports `buffer` and `weight_sync`, never `learner`. vLLM is imported by the `vllm_` files alone, when an engine starts.
"""
