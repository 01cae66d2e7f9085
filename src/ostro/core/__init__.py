"""Values that everything uses: errors, units, names of axes, what may be shown. No torch."""
