"""Run folders in; tables, figures and one HTML page out. Works from files alone, without torch.

runs      run folders as data: reading, grouping by seed, the numbers of a run
formats   how numbers are written
tables    the comparison, and the paper's table with this project's rows beside it
figures   the pictures
page      HTML and CSS
build     what stands on the page, in which order, and the files
"""

from layer_tying.report.build import write_report
from layer_tying.report.tables import comparison_table

__all__ = ["comparison_table", "write_report"]
