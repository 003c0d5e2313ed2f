"""What the toy's measures have to reach, and whether they do: one line each."""

from .evaluate import Examination
from .measures import mean_of

# Shares as they are, the rest as the text says.
TEACHER_LOOKS, TEACHER_MOTION = 0.95, 0.90
WITHIN_STUDENT, WITHIN_MERGED, WITHIN_NODES = 0.03, 0.03, 0.01
COMPARED = ("colour", "shape", "motion")
DISTANCE = {4: 3, 2: 5, 1: 10}  # steps -> times closer to the teacher than Euler
SLA_TIMES = 3  # times that training makes SLA's error smaller
DIVERSITY = 0.8  # of the teacher's spread


def verdicts(examination: Examination, sla_errors: dict[str, dict]) -> list[str]:
    """One line per goal: whether it is reached, what was found, what was wanted."""
    rows = {row.name: row.measures for row in examination.rows}
    teacher = next(m for name, m in rows.items() if name.startswith("teacher "))
    lines = [
        _goal("teacher's colour", teacher["colour"], TEACHER_LOOKS),
        _goal("teacher's shape", teacher["shape"], TEACHER_LOOKS),
        _goal("teacher's motion", teacher["motion"], TEACHER_MOTION),
    ]
    for name in COMPARED:
        student, merged = rows["rCM 4"][name], rows["merged 4"][name]
        nodes = rows["INT8 nodes 4"][name]
        lines += [
            _goal(f"rCM's {name} in 4 steps", student, teacher[name] - WITHIN_STUDENT),
            _goal(f"merged model's {name}", merged, student - WITHIN_MERGED),
            _goal(f"INT8 SageSLA's {name}", nodes, merged - WITHIN_NODES),
        ]
    for steps, times in DISTANCE.items():
        euler = next(m for n, m in rows.items() if n.startswith(f"Euler {steps} "))
        found = _times(euler["distance"], rows[f"rCM {steps}"]["distance"])
        lines.append(_goal(f"times closer than Euler {steps}", found, times))
    found = _times(mean_of(sla_errors["untuned"]), mean_of(sla_errors["tuned"]))
    lines.append(_goal("times SLA's error fell", found, SLA_TIMES))
    found = rows["rCM 4"]["spread"] / max(teacher["spread"], 1e-9)
    return [*lines, _goal("rCM's spread of starts beside the teacher's", found, DIVERSITY)]


def _times(larger: float, smaller: float) -> float:
    """How many times; a distance at the floor or below counts as 1/1000."""
    return larger / max(smaller, 1e-3)


def _goal(what: str, found: float, wanted: float) -> str:
    word = "reached" if found >= wanted else "NOT reached"
    return f"- {word}: {what} {found:.4g}, at least {wanted:.4g}"
