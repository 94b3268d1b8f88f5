"""One short readable file per embedded model; `course train NAME` runs it."""
