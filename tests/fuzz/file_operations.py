"""Numbers the file operations below a folder, so that a fuzzer can let the k-th one fail."""

import builtins
import contextlib
import io
import os
from unittest import mock

by_path = (
    "open",
    "replace",
    "rename",
    "unlink",
    "remove",
    "mkdir",
    "rmdir",
    "link",
    "symlink",
    "stat",
    "lstat",
    "scandir",
    "listdir",
    "chmod",
    "truncate",
)
by_number = ("fsync", "ftruncate", "close")
reading = ("open", "stat", "lstat", "scandir", "listdir", "read", "close")


def is_power_of_two(number):
    return number & (number - 1) == 0


class CountedFile:
    """An open file whose operations are numbered.

    A file is written in hundreds of small parts: of its reads and writes, the 1st, 2nd, 4th, 8th, ... count.
    """

    def __init__(self, file, path, operations):
        self.file, self.path, self.operations = file, path, operations
        self.done = {"read": 0, "write": 0}

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __iter__(self):
        return iter(self.file)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def counts(self, name):
        self.done[name] += 1
        return is_power_of_two(self.done[name])

    def read(self, *size):
        if self.counts("read"):
            self.operations.next("read", self.path)
        return self.file.read(*size)

    def write(self, content):
        if not self.counts("write"):
            return self.file.write(content)

        def half():
            "What a disk that fails has written of it."
            self.file.write(
                bytes(content)[: len(content) // 2]
                if isinstance(content, (bytes, memoryview))
                else content[: len(content) // 2]
            )
            self.file.flush()

        self.operations.next("write", self.path, half)
        return self.file.write(content)

    def flush(self):
        self.operations.next("flush", self.path)
        self.file.flush()

    def close(self):
        if not self.file.closed:
            self.operations.next("close", self.path, self.file.close)
        self.file.close()


class Operations:
    """Within `with operations:`, calls `at(number, name, path)` before each file operation below a folder.

    It raises an error or ends the process there. `done(name, path)` is called after an operation by path.
    """

    def __init__(self, folder, at, done=None):
        self.folder, self.at, self.done = os.path.realpath(folder), at, done
        self.number, self.active = 0, True

    def concerns(self, path):
        "The path as text where it lies in the folder, else None."
        try:
            path = os.fspath(path)
        except TypeError:
            return None
        text = os.fsdecode(path) if isinstance(path, (str, bytes)) else ""
        inside = self.active and (text == self.folder or text.startswith(self.folder + os.sep))
        return text if inside else None

    @contextlib.contextmanager
    def paused(self):
        "Context manager: inside it, nothing is numbered."
        before, self.active = self.active, False
        try:
            yield
        finally:
            self.active = before

    def next(self, name, path, partly=None):
        "Count an operation; before it fails, it is done `partly`."
        if not self.active:
            return
        number, self.number = self.number, self.number + 1
        with self.paused():
            self.at(number, name, path, partly)

    def path_function(self, name, function):
        def counted(path, *args, **kwargs):
            inside = self.concerns(path)
            if inside:
                self.next(name, inside)
            result = function(path, *args, **kwargs)
            if inside and self.done:
                with self.paused():
                    self.done(name, os.fspath(args[0]) if args and name == "replace" else inside)
            return result

        return counted

    def number_function(self, name, function):
        def counted(number, *args):
            path = self.active and isinstance(number, int) and self.concerns(self.path_of(number))
            if path:
                self.next(name, path, (lambda: function(number)) if name == "close" else None)
            return function(number, *args)

        return counted

    def path_of(self, number):
        with contextlib.suppress(OSError), self.paused():
            return os.readlink(f"/proc/self/fd/{number}")
        return ""

    def opened(self, function):
        def counted(file, mode="r", *args, **kwargs):
            is_number = isinstance(file, int) and not isinstance(file, bool)
            path = self.concerns(self.path_of(file) if is_number else file)
            if path is None:
                return function(file, mode, *args, **kwargs)
            if not is_number:
                self.next("open", path)
            return CountedFile(function(file, mode, *args, **kwargs), path, self)

        return counted

    def __enter__(self):
        self.patches = contextlib.ExitStack()
        opened = self.opened(builtins.open)
        for module in (builtins, io):
            self.patches.enter_context(mock.patch.object(module, "open", opened))
        for names, make in ((by_path, self.path_function), (by_number, self.number_function)):
            for name in names:
                self.patches.enter_context(mock.patch.object(os, name, make(name, getattr(os, name))))
        return self

    def __exit__(self, *error):
        self.patches.close()
