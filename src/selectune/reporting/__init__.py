def write_report(run):
    return None
