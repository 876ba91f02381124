"""Load against an endpoint, and what came of it: `inferfleet bench`.

    target     which address, model, key and certificate
    workload   what is asked: prompts that differ, answers of a given length
    stream     how the two APIs send tokens
    client     one request, measured
    steps      many requests at once, step after step, two targets in turns
    statistics exact percentiles and rates of a step
    compare    two targets' steps: ratios, and which are within the noise
    report, plot, page   a table, JSON, SVG, HTML

Only `client` and `steps` need aiohttp and uvloop, the extra `bench`.
"""
