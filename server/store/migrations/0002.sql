-- Nodes that failed an attempt, one per line; why a job waits now, in the words of its site ('' when nothing is to be said).
ALTER TABLE attempts ADD COLUMN bad_nodes TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN waiting TEXT NOT NULL DEFAULT '';
