"""Studies: is one way of training better than another?

    design       the YAML file, and the runs that follow from it
    records      the record of a run;  folder: study.json, runs.jsonl.gz and what they say together
    run          one run;  workers: where runs are done;  compare: all of a study, `run_study`
    statistics   verdicts and intervals;  looks: stopping early;  power: how large a study must be
    report/      the page of a study
    demo         `echo-lora demo`

Only `run`, `workers`, `compare` and `demo` import torch.
"""
