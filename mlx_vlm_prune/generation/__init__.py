"""From a request to an answer: the prompt, the token loop, the times, and what was kept.

It knows the language model by the protocol of `prefill` alone, whichever model has read the prompt.
"""
