-- Format 5 to 6.

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

-- Ratings of a refused candidate wait for a smaller try.
CREATE TABLE refused_counts (
    interaction INTEGER PRIMARY KEY,         -- interactions.id
    refused INTEGER NOT NULL                 -- candidates that were refused with it
) STRICT;
CREATE TRIGGER refused_counts_forgotten AFTER DELETE ON interactions BEGIN
    DELETE FROM refused_counts WHERE interaction = OLD.id;
END;
ALTER TABLE rejections ADD COLUMN returned INTEGER NOT NULL DEFAULT 0;

-- The policies that somebody made the anchor of the line.
CREATE TABLE anchors (
    id INTEGER PRIMARY KEY,
    version INTEGER NOT NULL,                -- 0: the base model
    reason TEXT NOT NULL,
    requested_by TEXT NOT NULL,
    requested_at REAL NOT NULL,
    applied_at REAL NOT NULL
) STRICT;

-- Feedback: an id may be sent again with other content, by several raters, and be taken back.
-- The table is made again, because its UNIQUE (interaction, feedback_id) goes.
CREATE TABLE feedback_6 (
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
INSERT INTO feedback_6 (id, interaction, over, feedback_id, rater, aspect, topic_partition, offset,
        event_time, arrived_at, state, latest)
    SELECT id, interaction, over, feedback_id, rater, aspect, topic_partition, offset,
        event_time, arrived_at, state, latest FROM feedback;
DROP TABLE feedback;
ALTER TABLE feedback_6 RENAME TO feedback;
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

-- The keys that servers made pseudonyms with. Who was recorded before this did not name theirs.
CREATE TABLE pseudonym_keys (
    fingerprint TEXT PRIMARY KEY,            -- '': replies that do not name it
    last_arrival REAL NOT NULL               -- of a reply with a pseudonym by it, Unix seconds
) STRICT, WITHOUT ROWID;
INSERT INTO pseudonym_keys
    SELECT '', 0 WHERE EXISTS (SELECT 1 FROM subjects WHERE user <> '')
        OR EXISTS (SELECT 1 FROM taught WHERE user <> '');
