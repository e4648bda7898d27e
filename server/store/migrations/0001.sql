-- Times are microseconds since 1970, 0 for "not yet". Enums have the numbers of common/job_state.h.
-- "num" is the gateway's own number of a job. Rows that belong to one job have keys that begin with it, so that a
-- job's rows lie together: attempts.id = num << 20 | number, point_segments.id = num << 28 | sequence within the job.

CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

CREATE TABLE tokens (
  name TEXT PRIMARY KEY,
  sha256 TEXT NOT NULL UNIQUE,  -- of the token; the token itself is nowhere
  role INTEGER NOT NULL,
  created_us INTEGER NOT NULL,
  revoked_us INTEGER NOT NULL   -- 0: valid
) WITHOUT ROWID;

CREATE TABLE owners (name TEXT PRIMARY KEY, live INTEGER NOT NULL) WITHOUT ROWID;

CREATE TABLE jobs (
  num INTEGER PRIMARY KEY,
  id TEXT NOT NULL,
  owner TEXT NOT NULL,
  request_id TEXT NOT NULL,
  content_sha256 TEXT NOT NULL,  -- of the submission: the same request again is the same job
  name TEXT NOT NULL,
  requested_site TEXT NOT NULL,
  ranks INTEGER NOT NULL,
  labels BLOB NOT NULL,          -- itwin.v1.Job with `labels`
  retry_of TEXT NOT NULL,
  resume TEXT NOT NULL,          -- attempt key or ''
  created_us INTEGER NOT NULL,
  started_us INTEGER NOT NULL,
  finished_us INTEGER NOT NULL,
  version INTEGER NOT NULL,      -- sequence of the newest event
  -- JobRecord
  state INTEGER NOT NULL,
  attempt INTEGER NOT NULL,
  cancel_requested INTEGER NOT NULL,
  site TEXT NOT NULL,
  reason TEXT NOT NULL,
  failure INTEGER NOT NULL,
  not_before_us INTEGER NOT NULL,
  retries_infra INTEGER NOT NULL,
  retries_preempted INTEGER NOT NULL,
  retries_app INTEGER NOT NULL,
  retries_other INTEGER NOT NULL,
  attempts_without_progress INTEGER NOT NULL,
  -- of the newest attempt
  progress BLOB NOT NULL,        -- itwin.v1.Progress
  summary BLOB NOT NULL          -- itwin.v1.Job with `summary`
);
CREATE UNIQUE INDEX jobs_id ON jobs (id);
CREATE UNIQUE INDEX jobs_request ON jobs (owner, request_id);
CREATE INDEX jobs_state ON jobs (state);
CREATE INDEX jobs_owner_state ON jobs (owner, state);
CREATE INDEX jobs_live ON jobs (version) WHERE state <= 10;

CREATE TABLE specs (job INTEGER PRIMARY KEY, spec BLOB NOT NULL);  -- itwin.v1.JobSpec

CREATE TABLE labels (
  key TEXT NOT NULL, value TEXT NOT NULL, job INTEGER NOT NULL,
  PRIMARY KEY (key, value, job)
) WITHOUT ROWID;

CREATE TABLE events (
  sequence INTEGER PRIMARY KEY,
  job INTEGER NOT NULL,
  time_us INTEGER NOT NULL,
  kind INTEGER NOT NULL,
  state INTEGER NOT NULL,        -- after the event
  attempt INTEGER NOT NULL,
  message TEXT NOT NULL,
  actor TEXT NOT NULL,
  failure INTEGER NOT NULL,
  site TEXT NOT NULL,
  not_before_us INTEGER NOT NULL,
  progress INTEGER NOT NULL
);
CREATE INDEX events_job ON events (job);

CREATE TABLE attempts (
  id INTEGER PRIMARY KEY,
  site TEXT NOT NULL,
  scheduler_id TEXT NOT NULL DEFAULT '',
  submitted_us INTEGER NOT NULL DEFAULT 0,
  started_us INTEGER NOT NULL DEFAULT 0,
  ended_us INTEGER NOT NULL DEFAULT 0,
  host TEXT NOT NULL DEFAULT '',
  exit_code INTEGER,
  signal INTEGER NOT NULL DEFAULT 0,
  cause INTEGER NOT NULL DEFAULT 0,
  failure INTEGER NOT NULL DEFAULT 0,
  reason TEXT NOT NULL DEFAULT '',
  cpu_seconds REAL NOT NULL DEFAULT 0,
  max_rss_bytes INTEGER NOT NULL DEFAULT 0,
  max_step INTEGER NOT NULL DEFAULT 0,
  checkpoint INTEGER NOT NULL DEFAULT 0,
  resume_attempt TEXT NOT NULL DEFAULT '',
  bad_lines INTEGER NOT NULL DEFAULT 0,
  cursor BLOB NOT NULL DEFAULT x'',  -- itwin.agent.v1.SpoolCursor: what is stored of the spool's files
  final_sizes BLOB,                  -- itwin.agent.v1.SpoolSizes
  result_json TEXT NOT NULL DEFAULT ''
);

CREATE TABLE outputs (
  job INTEGER NOT NULL, path TEXT NOT NULL, sha256 TEXT NOT NULL, size_bytes INTEGER NOT NULL,
  PRIMARY KEY (job, path)
) WITHOUT ROWID;

CREATE TABLE series (id INTEGER PRIMARY KEY, job INTEGER NOT NULL, name TEXT NOT NULL);
CREATE UNIQUE INDEX series_name ON series (job, name);

-- Points of one series that came in one commit, packed (point_codec.h). min and max leave NaN out; NULL is NaN.
CREATE TABLE point_segments (
  id INTEGER PRIMARY KEY,
  series INTEGER NOT NULL,
  attempt INTEGER NOT NULL,
  points INTEGER NOT NULL,
  min_step INTEGER NOT NULL,
  max_step INTEGER NOT NULL,
  min_time_us INTEGER NOT NULL,
  max_time_us INTEGER NOT NULL,
  min REAL,
  max REAL,
  last REAL,
  data BLOB NOT NULL
);

-- The mirror of stdout (1) and stderr (2): chunks without gaps, from offset 0.
CREATE TABLE log_chunks (
  id INTEGER PRIMARY KEY,
  attempt INTEGER NOT NULL,      -- attempts.id
  stream INTEGER NOT NULL,
  begin INTEGER NOT NULL,
  data BLOB NOT NULL
);
CREATE UNIQUE INDEX log_chunks_begin ON log_chunks (attempt, stream, begin);
CREATE TABLE log_sizes (
  attempt INTEGER NOT NULL, stream INTEGER NOT NULL,
  size INTEGER NOT NULL,         -- mirrored
  dropped INTEGER NOT NULL,      -- written by the program beyond the mirror's limit
  PRIMARY KEY (attempt, stream)
) WITHOUT ROWID;
