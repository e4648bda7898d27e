-- Traces asked for while a job runs: steps of the one that is wanted now, and how many there were. An early output came while its
-- attempt ran, and stays when outputs are collected.
ALTER TABLE events ADD COLUMN steps INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN trace_steps INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN traces INTEGER NOT NULL DEFAULT 0;
ALTER TABLE outputs ADD COLUMN early INTEGER NOT NULL DEFAULT 0;
