"""Files of runs that the run, the centre and the evaluation share."""
