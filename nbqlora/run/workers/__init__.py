"""Several cards from one cell: a worker process for each, started, heard and ended by the process that was asked.

Each worker is the ordinary run (:func:`nbqlora.run.steps.finetune_config`) in a process where torch.distributed finds
its variables, as under ``torchrun``; what they do together is torch's. This package is what lies around them::

    counting   how many processes an option means on this machine
    starting   processes, the store where they meet, and their end
    worker     what runs in one: hear what to do, do it, tell
    watching   events in, interrupts out, and why a run ended
    together   a run with workers, from its rows to its ``Run``

Why not torchrun's agent, which does nearly that: on an interrupt it gives its workers 30 s and kills them, less than a
step of a T4 and its checkpoint take; inside a kernel it takes the signal handlers and does not give them back; its
workers outlive it when it is killed. What it does well is used as it is: ``env://`` rendezvous with a ``TCPStore`` of
the parent, which listens on the loopback interface only, on a port that nobody had to guess, and is gone with it.

A worker is started, never forked: CUDA may run in the kernel. It leads a session of its own, so ■ and Ctrl-C, which
signal the whole process group, reach it only through the line on which it is told everything, once each. When that line
breaks, the notebook is gone: the worker finishes its step, saves and ends, or is ended ten seconds later.
"""
