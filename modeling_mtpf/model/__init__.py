"""The code that every published backbone carries: flat files, each importing its neighbours with one dot."""
