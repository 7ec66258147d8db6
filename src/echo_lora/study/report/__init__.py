"""The report of a study, in HTML and Markdown.

verdict      what the study says, in words
outcome      sections on results: differences, accuracies, controls, cost, forgetting
training     sections on training: learning rates, losses, the echo
page         the whole page, `write_report` and `summary_lines`
parts        what a page is made of;  texts: numbers as text;  plots: figures as SVG
"""
