"""The studio: a web page that starts, shows and uses runs; a face over the command line."""
