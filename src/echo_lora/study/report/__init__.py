"""The page of a study: verdict, results, curves, figures, in HTML and Markdown."""
