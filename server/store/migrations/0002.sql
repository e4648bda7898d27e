-- Nodes that failed an attempt, one per line; why a job waits now, in the words of its site ('' when nothing is to be said).
ALTER TABLE attempts ADD COLUMN bad_nodes TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN waiting TEXT NOT NULL DEFAULT '';
-- Which spool serves a site (HelloResponse.spool_id): another one under the same name must not be taken for it.
CREATE TABLE site_spools (site TEXT PRIMARY KEY, spool_id TEXT NOT NULL) WITHOUT ROWID;
