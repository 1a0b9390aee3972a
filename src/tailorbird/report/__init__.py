"""Tables, plots and the HTML report: how results look, never how they come about."""
