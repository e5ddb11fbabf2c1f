"""What a page is told: a dictionary that pages wait for when it changes."""

import threading


class News:
    """A dictionary `content`, and how often it was changed."""

    def __init__(self, **content):
        self.content, self.number, self._changed = content, 0, threading.Condition()

    def tell(self, **changes):
        """Change the dictionary, and wake those who wait."""
        with self._changed:
            self.content, self.number = self.content | changes, self.number + 1
            self._changed.notify_all()

    def wait(self, seen, seconds):
        """(number, content) as soon as the number is another than `seen`, or after some seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self.number != seen, seconds)
            return self.number, self.content
