"""Faults of data that others have made: a code each, and one line that says the way out."""

from dataclasses import dataclass

ERROR, WARNING = "error", "warning"

#: code -> (severity, what it means); docs/your_data.md prints this table
CODES: dict[str, tuple[str, str]] = {
    # files and variables
    "NO_FILE": (ERROR, "no file for a path or a pattern"),
    "UNREADABLE": (ERROR, "a file is truncated, or of no format that is read"),
    "CHANGED": (ERROR, "the files are not those that the run was made with"),
    "NO_VARIABLE": (ERROR, "a variable is not in the file"),
    "NO_COMPONENT": (ERROR, "the number in NAME[number] is beyond the components"),
    "COMPLEX": (ERROR, "complex numbers where fields are expected"),
    "NOT_NUMBERS": (ERROR, "neither real numbers nor packed ones"),
    "PACKED": (ERROR, "integers without scale_factor"),
    "FILTER_MISSING": (ERROR, "values are compressed by a filter that is not installed"),
    "FILES_DIFFER": (ERROR, "files of one set have other shapes, times or variables"),
    # dimensions
    "NO_DIMS": (ERROR, "the file does not name the dimensions"),
    "DIMS_COUNT": (ERROR, "dims has another number of names than the variable has dimensions"),
    "NO_ROLE": (ERROR, "a dimension is neither member, time nor side"),
    "SAME_ROLE": (ERROR, "two dimensions have one role"),
    "NO_SIDE": (ERROR, "a variable has no side, or more than three"),
    "SIDES_DIFFER": (ERROR, "physics has another number of sides than the variables"),
    # times
    "NO_TIME": (ERROR, "there is no time dimension, or its times are not stored"),
    "TIME_DUPLICATE": (ERROR, "a time is stored twice"),
    "TIME_DECREASES": (ERROR, "times decrease"),
    "TIME_UNEVEN": (ERROR, "times are not evenly spaced"),
    "TIME_STEP": (ERROR, "interval and spacing of the times do not fit"),
    "FEW_TIMES": (ERROR, "fewer than two stored times"),
    # box
    "NO_LENGTH": (ERROR, "the length of the box is neither stated nor in the file"),
    "LENGTH_DIFFERS": (ERROR, "the stated length is not spacing times points"),
    "GRID_UNEVEN": (ERROR, "points of a side are not evenly spaced"),
    "UNEQUAL_SIDES": (ERROR, "sides have other numbers of points or lengths"),
    "ODD_GRID": (ERROR, "an odd number of points"),
    "TINY_GRID": (ERROR, "fewer than eight points"),
    # state and closure
    "CLOSURE_GRID": (ERROR, "state and closure are on other grids"),
    "CLOSURE_TIMES": (ERROR, "state and closure have other members or times"),
    "CLOSURE_IS_STATE": (ERROR, "the closure is the state"),
    # values
    "NOT_FINITE": (ERROR, "NaN or Inf: which member, since when"),
    "FILL_VALUE": (ERROR, "numbers as large as those that stand for missing values"),
    "CONSTANT": (ERROR, "a field does not vary"),
    "REPEATED": (ERROR, "snapshots of neighbouring times are identical"),
    "SAME_MEMBERS": (ERROR, "two members are identical"),
    "ENDPOINT": (ERROR, "the last point of a side is the first one again"),
    "NOT_PERIODIC": (ERROR, "a jump between the last point and the first"),
    "DIVERGENT": (WARNING, "a vector has divergence"),
    "XY_SWAPPED": (ERROR, "the divergence vanishes if two axes are exchanged"),
    "VECTOR_AS_SCALARS": (WARNING, "fields stated as scalars have no divergence as a vector"),
    "NOT_FILTERED": (WARNING, "variance beyond the modes that a solver on this grid retains"),
    "PILE_UP": (WARNING, "the spectrum rises towards its end"),
    "LOW_PRECISION": (WARNING, "few different values"),
    "INTERVAL_LONG": (WARNING, "the interval is longer than the closure's correlation time"),
    "DRIFT": (WARNING, "mean or variance changes from the first third to the last"),
    "FEW_MEMBERS": (WARNING, "fewer than eight members"),
    "PARTS_SHORT": (WARNING, "parts of a long run are shorter than four correlation times"),
    "MEMBERS_ALIKE": (WARNING, "members are nearly equal, so training knows the test"),
    "LARGE_CHUNKS": (WARNING, "reading a snapshot unpacks far more than it needs"),
    # with a reduced solver
    "CLOSURE_SIGN": (ERROR, "the closure has the opposite sign of the defect"),
    "CLOSURE_FACTOR": (ERROR, "the closure is the defect times a factor"),
    "CLOSURE_UNRELATED": (WARNING, "the closure is not the defect of this reduced solver"),
    "TIME_REVERSED": (ERROR, "the reduced solver runs from the later state to the earlier"),
    "LENGTH_UNITS": (ERROR, "the defect is smallest for another length of the box"),
}
#: faults without which nothing can be read; data.accept does not take them
STRUCTURAL = tuple(CODES)[: tuple(CODES).index("CLOSURE_IS_STATE")]


@dataclass(frozen=True)
class Fault:
    """One fault of a data set.

    Attributes:
        code: key of :data:`CODES`.
        read: what was read, in words.
        expected: what was expected.
        way_out: what to do.
    """

    code: str
    read: str
    expected: str
    way_out: str

    @property
    def severity(self) -> str:
        return CODES[self.code][0]

    @property
    def line(self) -> str:
        """Return the fault in one line."""
        text = f"{self.code}: {self.read}; expected {self.expected}: {self.way_out}"
        return " ".join(text.split())


class DataFault(ValueError):
    """A fault without whose repair the data cannot be read; the message is its line."""

    def __init__(self, fault: Fault):
        super().__init__(fault.line)
        self.fault = fault


def refuse(code: str, read: str, expected: str, way_out: str) -> DataFault:
    """Return the exception of a fault."""
    return DataFault(Fault(code, read, expected, way_out))
