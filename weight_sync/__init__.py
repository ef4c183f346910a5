"""The way back: new weights from the learner to every engine, as one transaction per version.

`plan` and `transaction` decide (pure), `slots` writes and `shm` reads the bytes, `publisher` is the learner's side and
`receiver` the engine's. Nothing is imported here, so that an engine which only receives does not load torch.
"""
