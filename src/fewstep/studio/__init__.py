"""The studio, a web page that starts, shows and uses runs.

Every action is a command that a terminal takes, too."""
