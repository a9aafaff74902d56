"""The command line `sculpt-dist`. Nothing imports this but `python -m sculpt_dist` and the installed script.

`main` assembles the commands and sets exit codes; `run`, `plan`, `experiments`, `bench` and `reference` hold the
commands, `options` what they share, `console` what they print. A command imports what it needs when it is called.
"""
