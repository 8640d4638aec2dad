"""Every page, plot, table and card: plain data in, text out; the rooms of the steps gather the data."""
