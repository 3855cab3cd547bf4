"""The exit codes of every command: of `lingudistill`, of its subcommands, and of examples/distill.py.

| code | meaning |
|---|---|
| 0 | done; `check` and `plan`: it fits |
| 1 | `check` and `plan`: it does not fit; `blend`: no weight keeps what is asked. Elsewhere an error that nobody foresaw, with its traceback |
| 2 | bad input, said in one sentence; nothing was trained, nothing of the user's was changed |
| 3 | not published. After a training: the model is saved, and the sentence names the command that goes on |
| 4 | stopped at a loss, gradient or teacher that is not finite (`on_nan`) |
| 130 | interrupted (Ctrl-C). A training says at which step, and which checkpoint to go on from |
| 141 | the reader closed the pipe, as `head` does |

`LINGUDISTILL_DEBUG=1` shows the traceback behind a sentence.
"""

DONE = FITS = 0
DOES_NOT_FIT = 1
BAD_INPUT = 2
NOT_PUBLISHED = 3
NOT_FINITE = 4
INTERRUPTED = 130  # what a shell reports of a program that SIGINT ended
BROKEN_PIPE = 141  # and SIGPIPE

SUMMARY = (
    "Exit codes: 0 done, or it fits; 1 it does not fit (check, plan, blend); 2 bad input, said in one sentence (LINGUDISTILL_DEBUG=1 "
    "shows the traceback); 3 not published (after a training: saved); 4 stopped at a step that is not finite; 130 interrupted."
)
