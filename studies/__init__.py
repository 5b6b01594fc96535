"""The paper's and the report's claims, each as a study that anybody can run again: `python -m studies NAME`.

One study a file; its name has hyphens where the file's has underscores. `study.py` says what a study is and runs one,
`registry.py` lists them, `page.py` writes the table of all.
"""
