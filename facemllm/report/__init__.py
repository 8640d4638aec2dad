"""Every page, plot, table and card."""
