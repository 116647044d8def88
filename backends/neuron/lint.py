def check(graph, ranks): pass
