-- Which spool serves a site (HelloResponse.spool_id): another one under the same name must not be taken for it.
CREATE TABLE site_spools (site TEXT PRIMARY KEY, spool_id TEXT NOT NULL) WITHOUT ROWID;
