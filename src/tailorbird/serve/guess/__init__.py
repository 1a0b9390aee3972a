"""Guessing what follows a text, so that one step of the model checks several tokens: speculative decoding.

`tree` is what is guessed; `lookup`, `model`, `skip` and `heads` guess, `stepwise` is what the last three
share; `luck` measures how often guesses are right, `pace` what steps take, `worth` weighs the two, and
`guessing` lets those guess who pay. `open` makes guessers of what an option names, `check` chooses along what
was guessed.

Nothing is changed by guesses but time (https://arxiv.org/abs/2211.17192): a token depends on the tokens
before it and on its own random number only, and one that wasn't guessed is chosen in the same step.
"""
