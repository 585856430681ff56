"""The comparison matrix, pure: plan of the cells, rows and summaries, tables as text. Nothing here starts anything."""
