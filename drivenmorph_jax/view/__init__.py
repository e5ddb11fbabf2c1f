"""The page of a result: what it shows, the server that gives it to the browser of this machine, NiiVue, which draws."""
