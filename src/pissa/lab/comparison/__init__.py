"""`pissa compare`: methods against each other on the user's own data, with evidence.

plan.py     what is compared, and how many runs of how many steps that takes
task.py     the data as three disjoint parts: training, validation, test
search.py   which learning rate to try next, for every method with the same budget
trial.py    one run: trained by `pissa.train`, scored, recorded, its weights removed
watch.py    seconds and test loss while a run trains
score.py    what is measured on a trained model
record.py   the directory, and results.json made from what lies in it
continuation.py  whether a directory may be gone on with
run.py      all of it in order; the same command goes on where it stopped
"""
