"""Browser tests: notebooks as a reader meets them, in JupyterLab, Notebook 7 and Voila."""
