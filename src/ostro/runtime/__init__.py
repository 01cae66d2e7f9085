"""How a process lives and ends: signals, exit codes, hangs, phases, the log, memory and speed."""
