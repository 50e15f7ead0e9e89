-- The ledger, format 6. A change of it is a new format: see migrations/.
--
-- One row of `events` for every record that was consumed, with exactly one fate. Rows that scans
-- and look-ups touch are small; bodies lie compressed and encrypted in tables of their own, their
-- keys in another file (keys.py). Everything that a cycle asks has an index, so that a cycle costs
-- as much as its batch, however much is pending.

CREATE TABLE meta (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- One row per partition of one incarnation of a topic.
CREATE TABLE topic_partitions (
    id INTEGER PRIMARY KEY,
    topic TEXT NOT NULL,
    topic_id TEXT NOT NULL,
    partition INTEGER NOT NULL,
    next_offset INTEGER NOT NULL DEFAULT 0,
    consumed INTEGER NOT NULL DEFAULT 0,     -- records, counted apart from `events`
    arrived_at REAL NOT NULL DEFAULT 0,      -- latest arrival read, Unix seconds
    UNIQUE (topic, topic_id, partition)
) STRICT;

CREATE TABLE gaps (
    id INTEGER PRIMARY KEY,
    topic TEXT NOT NULL,
    partition INTEGER NOT NULL,
    expected_offset INTEGER NOT NULL,
    resumed_offset INTEGER NOT NULL,
    cause TEXT NOT NULL,
    at REAL NOT NULL,
    UNIQUE (topic, partition, expected_offset, resumed_offset, cause)
) STRICT;

CREATE TABLE events (
    topic_partition INTEGER NOT NULL REFERENCES topic_partitions (id),
    offset INTEGER NOT NULL,
    fate TEXT NOT NULL,
    reason TEXT NOT NULL,
    decided_by INTEGER,                      -- trained: version; rejected: rejections.id
    subject INTEGER,                         -- interactions.id or feedback.id (of the first one)
    PRIMARY KEY (topic_partition, offset)
) STRICT, WITHOUT ROWID;
CREATE INDEX events_by_decision ON events (decided_by) WHERE decided_by IS NOT NULL;

-- Kept by triggers: no path through the code can change a fate without its count.
CREATE TABLE totals (
    topic_partition INTEGER NOT NULL,
    fate TEXT NOT NULL,
    reason TEXT NOT NULL,
    events INTEGER NOT NULL,
    PRIMARY KEY (topic_partition, fate, reason)
) STRICT, WITHOUT ROWID;
CREATE TRIGGER events_counted AFTER INSERT ON events BEGIN
    INSERT INTO totals VALUES (NEW.topic_partition, NEW.fate, NEW.reason, 1)
        ON CONFLICT DO UPDATE SET events = events + 1;
END;
CREATE TRIGGER events_recounted AFTER UPDATE OF fate, reason ON events BEGIN
    UPDATE totals SET events = events - 1
        WHERE topic_partition = OLD.topic_partition AND fate = OLD.fate AND reason = OLD.reason;
    INSERT INTO totals VALUES (NEW.topic_partition, NEW.fate, NEW.reason, 1)
        ON CONFLICT DO UPDATE SET events = events + 1;
END;

-- Who may ask to be forgotten.
CREATE TABLE subjects (
    id INTEGER PRIMARY KEY,
    tenant TEXT NOT NULL,
    user TEXT NOT NULL,                      -- moorline.events.user_digest; '': nobody known
    key INTEGER,                             -- of their replies' bodies; NULL: each has its own
    UNIQUE (tenant, user)
) STRICT;
CREATE INDEX subjects_by_user ON subjects (user);
CREATE UNIQUE INDEX subjects_by_key ON subjects (key) WHERE key IS NOT NULL;

-- The keys that servers made pseudonyms with.
CREATE TABLE pseudonym_keys (
    fingerprint TEXT PRIMARY KEY,            -- '': replies that do not name it
    last_arrival REAL NOT NULL               -- of a reply with a pseudonym by it, Unix seconds
) STRICT, WITHOUT ROWID;

CREATE TABLE interactions (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    subject INTEGER REFERENCES subjects (id), -- NULL while awaited, and once erased
    topic_partition INTEGER,                 -- NULL while awaited
    offset INTEGER,
    state TEXT NOT NULL,
    untrainable TEXT,                        -- a Reason, or NULL
    event_time REAL NOT NULL,                -- cut at arrival; awaited: of the last feedback
    arrived_at REAL NOT NULL,
    prompt BLOB,                             -- digest, while retained
    tokens INTEGER NOT NULL,                 -- prompt and completion
    measurable INTEGER NOT NULL,             -- its tokens may measure a divergence
    open_ratings INTEGER NOT NULL DEFAULT 0, -- feedback on it in state ready; kept by triggers
    open_preferences INTEGER NOT NULL DEFAULT 0, -- waiting or ready, on either side; likewise
    retained INTEGER NOT NULL                -- the body is here and ratings are accepted
) STRICT;
CREATE INDEX interactions_by_subject ON interactions (subject) WHERE subject IS NOT NULL;
CREATE INDEX interactions_ready ON interactions (event_time, key) WHERE open_ratings > 0;
CREATE INDEX interactions_idle ON interactions (event_time)
    WHERE retained = 1 AND open_ratings = 0 AND open_preferences = 0;
CREATE INDEX interactions_decided ON interactions (event_time)
    WHERE retained = 1 AND open_ratings = 0 AND open_preferences = 0 AND state = 'decided';
CREATE INDEX interactions_forgotten ON interactions (event_time)
    WHERE retained = 0 AND open_preferences = 0;
CREATE TRIGGER ready_more AFTER UPDATE OF open_ratings ON interactions
WHEN OLD.open_ratings = 0 AND NEW.open_ratings > 0 BEGIN
    UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE name = 'ready_examples';
END;
CREATE TRIGGER ready_fewer AFTER UPDATE OF open_ratings ON interactions
WHEN OLD.open_ratings > 0 AND NEW.open_ratings = 0 BEGIN
    UPDATE meta SET value = CAST(value AS INTEGER) - 1 WHERE name = 'ready_examples';
END;

-- Further names that a request gave the person whose reply it is.
CREATE TABLE other_users (
    user TEXT NOT NULL,                      -- moorline.events.user_digest
    interaction INTEGER NOT NULL,            -- interactions.id
    PRIMARY KEY (user, interaction)
) STRICT, WITHOUT ROWID;
CREATE INDEX other_users_by_interaction ON other_users (interaction);
CREATE TRIGGER other_users_erased AFTER UPDATE OF subject ON interactions
WHEN NEW.subject IS NULL BEGIN
    DELETE FROM other_users WHERE interaction = NEW.id;
END;
CREATE TRIGGER other_users_forgotten AFTER DELETE ON interactions BEGIN
    DELETE FROM other_users WHERE interaction = OLD.id;
END;

-- Which policies wrote a reply that may still be trained on: their adapters must be kept.
CREATE TABLE behaviour_policies (
    interaction INTEGER NOT NULL REFERENCES interactions (id),
    version INTEGER NOT NULL,
    PRIMARY KEY (interaction, version)
) STRICT, WITHOUT ROWID;
CREATE INDEX behaviour_policies_by_version ON behaviour_policies (version);
CREATE TRIGGER no_longer_trainable AFTER UPDATE OF retained, untrainable ON interactions
WHEN NEW.retained = 0 OR NEW.untrainable IS NOT NULL BEGIN
    DELETE FROM behaviour_policies WHERE interaction = NEW.id;
END;

CREATE TABLE interaction_bodies (
    id INTEGER PRIMARY KEY,
    key INTEGER NOT NULL,
    body BLOB NOT NULL                       -- AES-GCM of zlib of the record's value
) STRICT;

CREATE TABLE feedback (
    id INTEGER PRIMARY KEY,
    interaction INTEGER NOT NULL REFERENCES interactions (id),
    over INTEGER,                            -- preference: interactions.id of the reply that lost
    feedback_id TEXT NOT NULL,
    revision INTEGER NOT NULL DEFAULT 0,     -- how many rows of this reply had its id before
    rater TEXT NOT NULL,
    aspect TEXT NOT NULL,                    -- of one rater and aspect, the last word counts
    retracts INTEGER NOT NULL DEFAULT 0,     -- it takes the rater's word back
    content BLOB,                            -- digest; NULL: erased, or from before format 6
    topic_partition INTEGER NOT NULL,
    offset INTEGER NOT NULL,
    event_time REAL NOT NULL,                -- never after arrival
    arrived_at REAL NOT NULL,
    state TEXT NOT NULL,
    latest INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX feedback_by_id ON feedback (interaction, feedback_id, revision);
CREATE INDEX feedback_arrived ON feedback (arrived_at, state);
CREATE UNIQUE INDEX feedback_latest ON feedback (interaction, rater, aspect) WHERE latest = 1;
CREATE INDEX feedback_over ON feedback (over) WHERE over IS NOT NULL;
CREATE INDEX feedback_waiting ON feedback (arrived_at) WHERE state = 'waiting';
CREATE INDEX feedback_ready ON feedback (arrived_at) WHERE state = 'ready';

-- A reply is an example as long as a rating of it waits for a batch.
CREATE TRIGGER rating_opened AFTER UPDATE OF state ON feedback
WHEN OLD.state <> 'ready' AND NEW.state = 'ready' BEGIN
    UPDATE interactions SET open_ratings = open_ratings + 1 WHERE id = NEW.interaction;
END;
CREATE TRIGGER rating_closed AFTER UPDATE OF state ON feedback
WHEN OLD.state = 'ready' AND NEW.state <> 'ready' BEGIN
    UPDATE interactions SET open_ratings = open_ratings - 1 WHERE id = NEW.interaction;
END;

-- A preference holds both of its replies until it is decided, and while it is learned from again.
CREATE TRIGGER preference_opened AFTER INSERT ON feedback
WHEN NEW.over IS NOT NULL AND NEW.state = 'waiting' BEGIN
    UPDATE interactions SET open_preferences = open_preferences + 1
        WHERE id IN (NEW.interaction, NEW.over);
END;
CREATE TRIGGER preference_closed AFTER UPDATE OF state ON feedback
WHEN NEW.over IS NOT NULL AND OLD.state IN ('waiting', 'ready')
    AND NEW.state NOT IN ('waiting', 'ready') BEGIN
    UPDATE interactions SET open_preferences = open_preferences - 1
        WHERE id IN (NEW.interaction, NEW.over);
END;
CREATE TRIGGER preference_reopened AFTER UPDATE OF state ON feedback
WHEN NEW.over IS NOT NULL AND OLD.state NOT IN ('waiting', 'ready') AND NEW.state = 'ready' BEGIN
    UPDATE interactions SET open_preferences = open_preferences + 1
        WHERE id IN (NEW.interaction, NEW.over);
END;

-- Those of trained feedback stay as long as the reply's: a revocation learns from it again.
CREATE TABLE feedback_bodies (
    id INTEGER PRIMARY KEY,
    key INTEGER NOT NULL,                    -- its own: rater and reader may each ask to be erased
    body BLOB NOT NULL
) STRICT;

-- Keys that encrypt nothing any more, until they are destroyed in the other file.
CREATE TABLE doomed_keys (
    key INTEGER PRIMARY KEY
) STRICT;
CREATE TRIGGER reply_gone AFTER DELETE ON interaction_bodies
WHEN NOT EXISTS (SELECT 1 FROM subjects WHERE key = OLD.key) BEGIN
    INSERT OR IGNORE INTO doomed_keys VALUES (OLD.key);
END;
CREATE TRIGGER word_gone AFTER DELETE ON feedback_bodies BEGIN
    INSERT OR IGNORE INTO doomed_keys VALUES (OLD.key);
END;

-- The outbox: a release is here, with the fates of its examples, before anybody hears of it.
CREATE TABLE releases (
    version INTEGER PRIMARY KEY,
    manifest TEXT NOT NULL,
    published INTEGER NOT NULL DEFAULT 0,
    revoked INTEGER NOT NULL DEFAULT 0       -- by a revocation: its bytes may go, nobody descends
) STRICT;
CREATE INDEX releases_unpublished ON releases (version) WHERE published = 0;

CREATE TABLE rejections (
    id INTEGER PRIMARY KEY,
    reason TEXT NOT NULL,
    parent INTEGER NOT NULL,
    examples INTEGER NOT NULL,
    at REAL NOT NULL,
    record TEXT NOT NULL,                    -- JSON: verdict, divergences, diagnostics
    returned INTEGER NOT NULL DEFAULT 0      -- more examples, which wait for a smaller try
) STRICT;

-- Batches from which there was nothing to learn.
CREATE TABLE no_updates (
    id INTEGER PRIMARY KEY,
    examples INTEGER NOT NULL,
    at REAL NOT NULL,
    record TEXT NOT NULL                     -- JSON: how far the stream had been read, and more
) STRICT;

-- What was decided of each example; the primary key makes "at most once" a law of the file.
CREATE TABLE decisions (
    example_id TEXT PRIMARY KEY,
    key TEXT NOT NULL,
    fate TEXT NOT NULL,
    reason TEXT NOT NULL,
    decided_by INTEGER
) STRICT, WITHOUT ROWID;
CREATE INDEX decisions_by_decision ON decisions (decided_by, fate) WHERE decided_by IS NOT NULL;

-- What is in the update under way, and in how many updates with it the process has crashed.
CREATE TABLE crash_counts (
    interaction INTEGER PRIMARY KEY,         -- interactions.id
    in_update TEXT,                          -- an UpdateRole; NULL: it is in none
    crash_count INTEGER NOT NULL DEFAULT 0,  -- since an update with it came to an end
    crash_count_alone INTEGER NOT NULL DEFAULT 0 -- of these, those in an update of it alone
) STRICT;
CREATE TRIGGER crash_counts_forgotten AFTER DELETE ON interactions BEGIN
    DELETE FROM crash_counts WHERE interaction = OLD.id;
END;

-- In how many refused candidates a reply was that waits for another try.
CREATE TABLE refused_counts (
    interaction INTEGER PRIMARY KEY,         -- interactions.id
    refused INTEGER NOT NULL                 -- candidates that were refused with it
) STRICT;
CREATE TRIGGER refused_counts_forgotten AFTER DELETE ON interactions BEGIN
    DELETE FROM refused_counts WHERE interaction = OLD.id;
END;

-- The policies that somebody made the anchor of the line; the newest unrevoked one counts.
CREATE TABLE anchors (
    id INTEGER PRIMARY KEY,
    version INTEGER NOT NULL,                -- 0: the base model
    reason TEXT NOT NULL,
    requested_by TEXT NOT NULL,
    requested_at REAL NOT NULL,              -- Unix seconds
    applied_at REAL NOT NULL                 -- Unix seconds
) STRICT;

-- Whose words and replies are in which release, also after their rows are gone.
CREATE TABLE taught (
    user TEXT NOT NULL,                      -- user_digest; '': nobody known
    tenant TEXT NOT NULL,
    version INTEGER NOT NULL,
    PRIMARY KEY (user, tenant, version)
) STRICT, WITHOUT ROWID;
CREATE INDEX taught_by_version ON taught (version);

-- What was asked, and what it came to. Kept, as the record that it was done.
CREATE TABLE erasures (
    id TEXT PRIMARY KEY,
    request TEXT NOT NULL,                   -- moorline.events.Erasure: no names, only digests
    applied_at REAL NOT NULL,
    interactions INTEGER NOT NULL,
    feedback INTEGER NOT NULL,
    releases TEXT NOT NULL,                  -- JSON: versions that had learned from the subject
    last_clean_version INTEGER NOT NULL,     -- the newest in the live line that had not
    revoke INTEGER NOT NULL,
    revocation_version INTEGER               -- the release that a revocation began with
) STRICT;
CREATE INDEX erasures_to_revoke ON erasures (id) WHERE revoke = 1 AND revocation_version IS NULL;

-- Whatever comes in later and is older than this is erased on arrival.
CREATE TABLE erasure_markers (
    scope TEXT PRIMARY KEY,
    at REAL NOT NULL
) STRICT, WITHOUT ROWID;

INSERT INTO meta VALUES ('ready_examples', '0'), ('lease_epoch', '0');
