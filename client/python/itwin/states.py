"""The states of a job by their short names."""

from itwin.v1 import jobs_pb2

FINAL = ("SUCCEEDED", "FAILED", "CANCELLED")


def name(state):
    """"RUNNING" for JOB_STATE_RUNNING; a number this package does not know yet is shown as it is."""
    try:
        return jobs_pb2.JobState.Name(state)[len("JOB_STATE_"):]
    except ValueError:
        return f"STATE_{state}"


def number(text):
    """The enum's value for a short name, in any case. Raises ValueError listing the names."""
    key = "JOB_STATE_" + str(text).strip().upper()
    if key == "JOB_STATE_UNSPECIFIED" or key not in jobs_pb2.JobState.keys():
        names = ", ".join(k[len("JOB_STATE_"):] for k in jobs_pb2.JobState.keys()[1:])
        raise ValueError(f"'{text}' is not a state of a job. States: {names}.")
    return jobs_pb2.JobState.Value(key)


def is_final(state):
    return name(state) in FINAL


def failure(value):
    """"APP" for FAILURE_CLASS_APP; "" when there is none."""
    try:
        text = jobs_pb2.FailureClass.Name(value)[len("FAILURE_CLASS_"):]
    except ValueError:
        return f"CLASS_{value}"
    return "" if text == "UNSPECIFIED" else text
