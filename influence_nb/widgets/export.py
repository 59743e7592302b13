def write(explorer, path):
    raise NotImplementedError
