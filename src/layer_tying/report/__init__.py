"""Run folders become tables, figures and one HTML page. Works from files alone, without torch.

runs             runs grouped by seed, and the numbers of a run
formats          how numbers are written
markdown         the one Markdown table
tables           the comparison of runs, and the paper's figures next to them
style            colours and type of the figures
figures_tying    which layers share weights
figures_mixture  what layers mix
figures_curves   metrics over training, and memory
figures_agent    what an agent has learned
page             HTML, from templates/
build            what is on the page, in which order, and the files
results          the page of the paper's rows
"""

from layer_tying.report.build import write_report
from layer_tying.report.tables import comparison_table

__all__ = ["comparison_table", "write_report"]
