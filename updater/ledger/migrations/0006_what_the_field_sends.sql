-- Format 5 to 6: what the field sends.

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
