"""What recorded runs say, with intervals: accuracy, time to answer, tokens, and how far each row can be trusted.

`rrm_engine.analyze.analysis` makes one plain document of the runs; tables, CSV files, plots and the page of
`rrm_engine.render` are made from that.
"""
