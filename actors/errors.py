"""One error for bad input: it names the value, the place and the fix, and exits 2 on the command line."""

from __future__ import annotations


class BadInput(ValueError):
    """Input that cannot work, found before any work starts.

    ``where`` is the place a user can edit: a YAML path (``methods[1].bits``), an option (``--group-size``) or a file.
    """

    def __init__(self, problem: str, *, where: str = "", fix: str = "") -> None:
        self.problem, self.where, self.fix = problem, where, fix
        text = f"{where}: {problem}" if where else problem
        super().__init__(f"{text}. {fix}" if fix else text)

    def __reduce__(self):  # keeps the fields when Ray carries the error between processes
        return (_rebuild, (self.problem, self.where, self.fix))

    def at(self, prefix: str) -> BadInput:
        """The same error, located under ``prefix`` (``methods[1]`` + ``bits`` -> ``methods[1].bits``)."""
        return BadInput(self.problem, where=f"{prefix}.{self.where}" if self.where else prefix, fix=self.fix)


def _rebuild(problem: str, where: str, fix: str) -> BadInput:
    return BadInput(problem, where=where, fix=fix)


class CellError(RuntimeError):
    """A cell that failed while it ran (singular Hessian, NaN loss, no memory): becomes a row of ``failed``, the sweep goes on."""
