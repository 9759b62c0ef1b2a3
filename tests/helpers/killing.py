"""A process that is killed in the middle, within the test's own."""


class Killed(BaseException):
    """Passes every `except` that a killed process would not run."""


def kill_at(monkeypatch, owner, name, call):
    """Makes the `call`-th call of `owner.name` die."""
    original, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, dying)
