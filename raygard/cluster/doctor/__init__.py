"""Can a cluster run a job? `facts` asks the nodes, `checks` judges, `memory` estimates, `examine` does it all."""
