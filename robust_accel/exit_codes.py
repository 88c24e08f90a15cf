"""With what the command line ends, as ``sysexits.h`` has it where it has a word; 0 is success."""

NOT_FINITE = 1
"""Training met NaN or Inf and ended: one line says where. Faults of ours end so too, by Python."""
USAGE = 2
"""A recipe, an argument or data are not as they must be: one line says what."""
UNAVAILABLE = 69
"""A process of the run does not answer or is gone, or the network: one line names it."""
UNWRITABLE = 74
"""The disk is full, or a folder cannot be written."""
STOPPED = 75
"""Ended as asked (SIGTERM, SIGUSR1, SIGHUP, ``train.max_time``): ``--resume`` goes on."""
INTERRUPTED = 130
"""The same after SIGINT."""
