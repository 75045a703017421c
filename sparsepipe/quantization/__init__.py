"""Static int8: calibration, and the rewriting of quantised graphs for the int8 operators of the kernel library."""
